"""Makes Triton's interpreter a third faster.

While a kernel runs, the interpreter has replaced the functions of ``triton.language`` by its own. It looks for what is left to replace
again at every call of a device function, among some 340 names, and never finds anything.
"""

from triton.runtime import interpreter


class _Nothing:
    def restore(self) -> None:
        """Does nothing: the kernel that is running restores everything."""


def replace_language_once() -> None:
    """Let the interpreter replace the functions of ``triton.language`` once a kernel, not at each call of a device function."""
    replace = interpreter._patch_lang
    modules = {id(module): module.__name__ for module in (interpreter.tl, interpreter.tl.core)}
    read = dict[object, frozenset[str]]()  # the modules among the globals of a function
    replaced = set[str]()

    def replace_once(function):
        if function not in read:
            read[function] = frozenset(modules[id(v)] for v in function.__globals__.values() if id(v) in modules)
        new = read[function] - replaced
        if not new:
            return _Nothing()
        scope = replace(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            replaced.difference_update(new)
            restore()

        replaced.update(new)
        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = replace_once
