"""Loops in user code: a step that is repeated is traced and compiled once.

``source``    a ``for`` statement: what its body assigns, carries on, appends (``names``)
``step``      the same as a function that makes its steps
``hook``      has Dynamo trace such a loop as one `dspark_compile.ops.decode_loop` call
``indexing``  subscripts by a number that changes, while that is traced
``split``     a graph with loops as pieces, each compiled by itself
``numbers``   the loop's Python numbers as tensors, so that a step is the same graph every time
"""
