"""From a dspark op to C++: the emitter, the printed mask predicate, the builder and its cache.

Import as ``dspark_compile.codegen.cpp``.
"""
