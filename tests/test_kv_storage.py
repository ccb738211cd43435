"""The registry behind ``kv_cache="int8"``: compressed twins, and originals that cannot be read."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from dspark_compile.runtime import KVCacheError, kv_storage

REASON = kv_storage.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SHAPE = (2, 2, 16, 8)
MESSAGE = r'options=\{"kv_cache": "int8"\}.*decompress_cache'


def cache_tensor(dtype=torch.float32):
    return torch.randn(SHAPE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_content_is_kept_and_comes_back(dtype):
    x = cache_tensor(dtype)
    x[:, :, 9:] = 0
    exact = x.clone()
    twin = kv_storage.compress(x)
    assert (twin.data.dtype, twin.data.shape, twin.scale.shape) == (torch.int8, SHAPE, SHAPE[:-1])
    assert kv_storage.compress(x) is twin is kv_storage.twin(x)
    assert kv_storage.is_compressed(x)
    error = (twin.dequantize().float() - exact.float()).abs()
    assert (error <= exact.float().abs().amax(-1, keepdim=True) * 0.01).all()
    rounded = twin.dequantize()
    assert kv_storage.restore(x) is x
    assert not kv_storage.is_compressed(x)
    assert torch.equal(x, rounded)
    x.add_(1)


def test_memory_is_returned_and_metadata_stays():
    from torch.multiprocessing.reductions import StorageWeakRef

    x = cache_tensor(torch.bfloat16)
    storage = StorageWeakRef(x.untyped_storage())
    before = (x.shape, x.stride(), x.dtype, x.device, x._version, torch._C._dispatch_keys(x))
    twin = kv_storage.compress(x)
    assert storage.expired()
    now = (x.shape, x.stride(), x.dtype, x.device, x._version, torch._C._dispatch_keys(x))
    assert now == before
    assert twin.nbytes == 512 + 2 * 64
    assert kv_storage.cache_bytes([x]) == (twin.nbytes, 1024)


def test_zeros_stay_zeros():
    twin = kv_storage.compress(torch.zeros(SHAPE))
    assert not twin.data.any() and not twin.scale.any()


# Each in a forked process, where a crash shows: nothing may crash, and only metadata is legal.
ACCESSES = """
x + 1; x.clone(); x.sum(); x.max(); repr(x); format(x); x.tolist(); x[0, 0, 0, 0].item()
x.numpy(); numpy.asarray(x); torch.save(x, io.BytesIO()); pickle.dumps(x); copy.deepcopy(x)
x.zero_(); x.fill_(1); x.copy_(torch.ones(2, 2, 16, 8)); torch.ones(2, 2, 16, 8).copy_(x)
x.index_copy_(2, torch.tensor([1]), torch.ones(2, 2, 1, 8)); x.__setitem__((0, 0, 3), 1.0)
x.index_select(2, torch.tensor([1])); x[:, :, torch.tensor([1])]; x[0, 0] + 0; x[:, :, :4].clone()
x.data + 1; x.detach() + 1; x.data_ptr(); x.untyped_storage().data_ptr(); x.untyped_storage()[0]
x.untyped_storage().clone(); x.untyped_storage().fill_(0); x.untyped_storage().tolist()
x.untyped_storage().resize_(1 << 20); x.resize_(2, 2, 32, 8); x.share_memory_()
torch.cat([x, x]); torch.stack([x]); x.view(64, 8) @ torch.ones(8, 4); x @ x.mT; x.to(torch.float64)
x.transpose(1, 2).contiguous(); x.as_strided((2, 2), (1, 1)).clone(); x.view(torch.int32).clone()
torch.nn.functional.scaled_dot_product_attention(x, x, x); torch.where(x > 0, x, x); x.equal(x)
torch.utils.dlpack.to_dlpack(x); torch._foreach_add([x], 1); torch.add(x, 1, out=x); x.nonzero()
torch.quantize_per_tensor(x, 0.1, 0, torch.qint8); x.to_sparse(); x.normal_()
torch.einsum('bhnd->bn', x); ForkingPickler.dumps(x); x.map_(x, lambda a, b: a)
x.repeat_interleave(2, 0); x.roll(1, 2); torch.tensor(x); x.sort(); x.softmax(-1); x.bfloat16()
"""
RUN = """
import copy, io, os, pickle, sys, warnings
import numpy, torch
from multiprocessing.reduction import ForkingPickler
import torch.multiprocessing
from dspark_compile.runtime import kv_storage
torch.set_num_threads(1)
kv_storage.unavailable()
bad = []
for access in sys.stdin.read().replace(chr(10), ";").split(";"):
    access = access.strip()
    if not access:
        continue
    read, write = os.pipe()
    child = os.fork()
    if not child:
        warnings.simplefilter("ignore")
        x = torch.randn(2, 2, 16, 8)
        kv_storage.compress(x)
        try:
            eval(access)
            said = "no error"
        except Exception as error:
            known = "kv_cache" in str(error) or "not resizable" in str(error)
            said = "ok" if known else repr(error)
        os.write(write, said.encode()[:500])
        os._exit(0)
    os.close(write)
    said = os.read(read, 500).decode()
    os.close(read)
    _, status = os.waitpid(child, 0)
    if status or said != "ok":
        bad.append(f"{access}: status {status}: {said}")
print(chr(10).join(bad))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_every_access_is_an_error_and_none_a_crash():
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=ACCESSES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_storage_methods_do_not_abort():
    x = cache_tensor()
    kv_storage.compress(x)
    assert x.untyped_storage().new().nbytes() == 0
    assert not x.is_shared() and not x[0].is_shared() and not x.untyped_storage().is_shared()


def test_views_made_later_are_errors_too():
    x = cache_tensor()
    kv_storage.compress(x)
    view = x[:, :, 1:3].transpose(1, 2)
    with pytest.raises(RuntimeError, match=MESSAGE):
        view.sum()
    with pytest.raises(KVCacheError):
        kv_storage.compress(x.detach())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.randn(4, *SHAPE)[1], "view"),
        (lambda: torch.randn(2, 16, 2, 8).transpose(1, 2), "contiguous"),
        (lambda: torch.randn(SHAPE, requires_grad=True), "gradients"),
        (lambda: torch.zeros(SHAPE, dtype=torch.float64), "dtype"),
        (lambda: torch.zeros(SHAPE, dtype=torch.int8), "dtype"),
        (lambda: torch.zeros(2, 16, 8), "dimensions"),
        (lambda: torch.zeros(2, 2, 0, 8), "empty"),
        (lambda: torch.zeros(SHAPE, device="meta"), "memory of its own"),
        (lambda: torch.from_numpy(__import__("numpy").zeros(SHAPE, "float32")), "torch's own"),
        (lambda: torch.zeros(SHAPE).share_memory_(), "shared between processes"),
    ],
)
def test_refused(make, reason):
    x = make()
    assert reason in kv_storage.why_not(x)
    with pytest.raises(KVCacheError, match=reason):
        kv_storage.compress(x)
    assert not kv_storage.is_compressed(x)
    if x.device.type != "meta":
        x.clone()


@pytest.mark.parametrize(
    "share",
    [
        lambda x: x[0],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: torch.empty(0).set_(x),
    ],
    ids=["view", "detach", "numpy", "dlpack", "set_"],
)
def test_refused_while_shared(share):
    x = cache_tensor()
    exact = x.clone()
    other = share(x)
    assert kv_storage.why_not(x)
    with pytest.raises(KVCacheError):
        kv_storage.compress(x)
    assert torch.equal(x, exact)
    del other


def test_fine_after_a_view_is_gone():
    x = cache_tensor()
    other = x[0]
    del other
    kv_storage.compress(x)


def test_twin_dies_with_its_tensor():
    gc.collect()  # other tests' tensors may wait in cycles for the collector
    before = set(kv_storage._entries)
    x = cache_tensor()
    twin = weakref.ref(kv_storage.compress(x))
    (own,) = set(kv_storage._entries) - before
    del x
    gc.collect()
    assert twin() is None
    assert own not in kv_storage._entries


def test_new_memory_makes_it_exact_again():
    x = cache_tensor()
    kv_storage.compress(x)
    x.data = torch.full(SHAPE, 3.0)
    assert not kv_storage.is_compressed(x)
    assert x.sum() == 3 * x.numel()
    torch.testing.assert_close(kv_storage.compress(x).dequantize(), torch.full(SHAPE, 3.0),
                               rtol=0.01, atol=0)  # fmt: skip


def test_reset_and_release():
    x = cache_tensor()
    twin = kv_storage.compress(x)
    kv_storage.reset(x)
    assert kv_storage.compress(x) is twin
    assert not twin.dequantize().any()
    kv_storage.release(x)
    assert not kv_storage.is_compressed(x)
    with pytest.raises(RuntimeError, match=MESSAGE):
        x.sum()
    assert not kv_storage.compress(x).dequantize().any()
    y = cache_tensor()
    kv_storage.reset(y)
    assert not y.any()


@pytest.mark.parametrize("inference", [True, False])
def test_inference_tensors(inference):
    with torch.inference_mode(inference):
        x = cache_tensor()
    keys = torch._C._dispatch_keys(x)
    twin = kv_storage.compress(x)
    twin.data.add_(0)
    with pytest.raises(RuntimeError, match=MESSAGE):
        x.sum()
    kv_storage.restore(x)
    assert x.is_inference() is inference
    assert torch._C._dispatch_keys(x) == keys


def test_one_twin_for_many_threads():
    for _ in range(20):
        x, found, start = cache_tensor(), [], threading.Barrier(8)

        def get(x=x, found=found, start=start):
            start.wait()
            found.append(kv_storage.compress(x))

        threads = [threading.Thread(target=get) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8 and len({id(twin) for twin in found}) == 1


class Layer:
    """The state of one layer of a static cache."""

    def __init__(self):
        self.keys, self.values = torch.zeros(SHAPE), torch.zeros(SHAPE)
        self.length = torch.tensor(0)
        for tensor in (self.keys, self.values, self.length):
            torch._dynamo.mark_static_address(tensor)

    def reset(self):
        for tensor in (self.keys, self.values, self.length):
            tensor.zero_()


def attend(q, k, v, cache):
    positions = torch.arange(k.shape[2]) + cache.length
    cache.length.add_(k.shape[2])
    cache.keys.index_copy_(2, positions, k)
    cache.values.index_copy_(2, positions, v)
    mask = torch.arange(SHAPE[2]) <= positions[:, None]
    keys = cache.keys[:, :, None].expand(-1, -1, 1, -1, -1).reshape(SHAPE)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, cache.values, mask)


def test_prefill_and_decode_graphs_share_a_twin_and_nothing_recompiles():
    graphs = []

    def backend(gm, inputs):
        """What the compiler's wrapper does, with the rewritten graph spelt out."""
        graphs.append(gm)

        def call(*args):
            twins = {
                i: kv_storage.compress(x)
                for i, x in enumerate(args)
                if isinstance(x, torch.Tensor) and x.shape == SHAPE
            }
            exact = [twins[i].dequantize() if i in twins else x for i, x in enumerate(args)]
            out = gm(*exact)
            for i, twin in twins.items():
                data, scale = torch.ops.dspark.quantize_kv(exact[i], twin.scale.dtype)
                twin.data.copy_(data)
                twin.scale.copy_(scale)
            return out

        return call

    step = torch.compile(attend, backend=backend, fullgraph=True)
    layer = None
    for _ in range(3):
        layer, exact = Layer(), Layer()
        for _again in range(2):
            for rows in (5, 1, 1, 1):
                q, k, v = torch.randn(3, 2, 2, rows, 8).unbind(0)
                torch.testing.assert_close(
                    step(q, k, v, layer), attend(q, k, v, exact), rtol=0.03, atol=0.03
                )
            assert len(graphs) == 2
            assert kv_storage.is_compressed(layer.keys)
            with pytest.raises(RuntimeError, match=MESSAGE):
                layer.reset()
            kv_storage.reset_cache(layer)
            exact.reset()
            assert int(layer.length) == 0
    kv_storage.decompress_cache(layer)
    layer.reset()


def test_cache_objects():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_size=16
    )
    cache = transformers.StaticCache(config, max_cache_len=16)
    for i in range(2):
        cache.update(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), i)
    for layer in cache.layers:
        kv_storage.compress(layer.keys)
        kv_storage.compress(layer.values)
    stored, exact = kv_storage.cache_bytes(cache)
    assert exact == 4 * 2 * 2 * 16 * 8 * 4
    assert stored < exact
    with pytest.raises(RuntimeError, match=MESSAGE):
        cache.reset()
    keys = cache.layers[0].keys
    kv_storage.reset_cache(cache)
    assert cache.layers[0].keys is keys
    assert int(cache.get_seq_length()) == 0
    assert kv_storage.decompress_cache(cache) is cache
    assert not cache.layers[1].values.any()
    cache.update(torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), 0)


def test_module_buffers():
    module = torch.nn.Module()
    module.register_buffer("k_cache", cache_tensor())
    kv_storage.compress(module.k_cache)
    with pytest.raises(RuntimeError, match=MESSAGE):
        copied = {name: x.clone() for name, x in module.state_dict().items()}
        del copied
    kv_storage.decompress_cache(module)
    module.k_cache.sum()


def test_names_load_without_the_rest():
    code = (
        "import sys, dspark_compile.runtime as r; r.compress; r.KVCacheError; "
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
