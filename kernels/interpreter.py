"""Triton's interpreter, without what it does over and over.

It replaces the members of triton.language before each launch, and again, to no effect, before every call of a function
inside of one: a quarter of the time that these kernels take there.
"""

from collections.abc import Callable


def replace_once_per_launch() -> None:
    """Calls inside of a launch leave alone what is replaced already. A Triton that has another way is left as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = getattr(interpreter, "_patch_lang", None)
    if replace is None or getattr(replace, "once_per_launch", False):
        return
    replaced: set[int] = set()  # modules, while a launch goes on

    class Launch:
        """What a launch puts back at its end."""

        def __init__(self, scope) -> None:
            self.scope = scope

        def restore(self) -> None:
            replaced.clear()
            self.scope.restore()

    def replace_once(function: Callable):
        modules = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        inside = bool(replaced)
        if inside and modules <= replaced:
            return None  # of a call; a launch alone puts back
        replaced.update(modules)
        scope = replace(function)
        return scope if inside else Launch(scope)

    replace_once.once_per_launch = True
    interpreter._patch_lang = replace_once
