"""The backends that the tests compare on CPU tensors.

`cpu` is among them wherever its extension is loaded; that it is loaded wherever torch is new enough for it is what
test_extension.py tests.
"""

from libmoe_fast import available_backends

CPU_BACKENDS = [name for name in ("reference", "cpu") if available_backends()[name] is None]
