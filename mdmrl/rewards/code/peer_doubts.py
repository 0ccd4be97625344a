"""What the tests' end believes of a program's objects: behind `peer_objects.py`, in its namespace.

It gives nothing away by them. An operand is often the very value that a test expects, so where a
program's object is asked about plain data (`it == 9`, `9 in it`, `it - 9`) it is asked about decoys
too, in an order that it cannot know, and what holds for those holds for nothing. An object of a
class that the tests do not use as one themselves, as they do in `Stack().push(1)`, stands perhaps
in an answer's place: a data type's methods are then the data type's own, and where only its word
would make it right there is no verdict.
"""
# ruff: noqa: F821

PREDICATES = "startswith endswith issubset issuperset isdisjoint union intersection difference "
PREDICATES += "symmetric_difference count index find rfind equals __contains__ __eq__ __ne__ "
PREDICATES = (PREDICATES + "__lt__ __le__ __gt__ __ge__").split()  # of what a data type would say
STRANGER = object()  # that no object has anything to do with
draws = {"state": 1}


def compared(self, name, other):
    if state["decoding"]:
        return (self is other) != (name == "__ne__")
    if is_remote(other):
        result = apply(name, self, other)
        if result is NotImplemented or not result or name == "__ne__":
            return result
        return not holds(name, self, STRANGER)
    result, strange, alike = about(self, name, other)
    if result is NotImplemented or (name == "__contains__" and not result):
        return result
    if name in ("__eq__", "__ne__"):
        equal = name == "__eq__"
        if result != equal:
            return result
        false = equal in (strange, *alike)
        if not false and not is_meant(self):
            give_up()
        return result != false
    false = strange is True or {*alike} == {True}
    if not is_trusted(self):
        if not false and {*alike} != {result}:
            give_up()
        false = True
    if false and name == "__contains__":
        return give_up() if is_trusted(self) else False
    if false:
        raise TypeError(f"an object of the program's compares ({name}) with anything")
    return result


def computed(self, name, *operands):
    result = apply(name, self, *map(copied, operands))
    if is_meant(self):
        built.add(theirs.get(id(result)))
    if result is NotImplemented or any(map(is_remote, operands)):
        return result
    if not is_remote(result):
        _, _, alike = about(self, name, *operands)
        if alike and all(type(other) is type(result) and other == result for other in alike):
            raise TypeError(f"an object of the program's computes {name} with anything alike")
        return result if is_meant(self) else give_up()
    if result is self and name not in INPLACE and not is_trusted(self):
        raise TypeError(f"an object of the program's is its own {name} with plain data")
    return result if is_trusted(self) else give_up()


def doubted_method(self, name):
    method = attribute(self, name)

    def call(value, *more):
        if is_remote(value):
            return method(value, *more)
        result, strange = [method(copied(x), *more) for x in (value, [*decoys(value), STRANGER][0])]
        if result == strange or is_remote(result):
            raise AttributeError(name)
        give_up()

    return call


def is_due(error, trace):
    """Whether an error in a `with` is none that a program calls off: an assert's, or one that would
    have an assert there not hold but be left out."""
    import ast

    if error is None or isinstance(error, AssertionError):
        return error is not None
    place, within = trace.tb_frame, []
    for node in ast.walk(ast.parse(sources.get(place.f_code.co_filename, ""))):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            last = node.items[-1].context_expr.end_lineno
            within += ast.walk(node) if node.lineno <= place.f_lineno <= last else ()
    asserts = [node for node in within if isinstance(node, ast.Assert)]
    asserts = [node for node in asserts if not isinstance(node.test, ast.Constant)]
    return any(node.end_lineno >= trace.tb_lineno for node in asserts)


def about(self, name, value, *more):
    """What an object says about plain data, about a stranger, and about decoys of that data."""
    asked = [value, STRANGER, *decoys(value)]
    found = [None] * len(asked)
    for index in sorted(range(len(asked)), key=draw):
        try:
            found[index] = apply(name, self, copied(asked[index]), *more)
            if name in COMPARED and found[index] is not NotImplemented:
                found[index] = bool(found[index])
        except Exception as error:
            found[index] = error
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0], found[1], found[2:]


def draw(_):
    draws["state"] = (draws["state"] * 6364136223846793005 + 1442695040888963407) % 2**64
    return draws["state"] >> 33


def copied(value):
    """So that who is asked cannot change it."""
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def decoys(value):
    """Plain data of the same type that is not equal to it."""
    kind, found = type(value), []
    if kind is bool:
        found = [not value]
    elif kind in (int, float):
        far = 10**6 + abs(value) * (7 + draw(0) % 5)
        found = [value + 1 + draw(0) % 3, value - 1 - draw(0) % 3, -value - 7]
        found += [value + far, value - far]
    elif kind in (str, bytes, list, tuple):
        extra = {str: "a", bytes: b"a"}.get(kind)
        extra = extra or kind([*(decoys(value[-1]) if value else ()), 0][:1])
        found = [value + extra, extra + value, value[1:], value[:-1] + extra, value[::-1]]
    elif kind in (set, frozenset):
        found = [value | {"a"}, value ^ {next(iter(value), 0)}]
    elif kind is dict:
        found = [{**value, "a": 0}, {key: (decoys(item) or [0])[0] for key, item in value.items()}]
    elif value is None:
        found = [0, ""]
    return [other for other in found if other != value]


def holds(name, *operands):
    try:
        result = apply(name, *operands)
        return result is not NotImplemented and bool(result)
    except Exception:
        return False
