"""What Metal's compiler would refuse in a kernel's text, as far as Clang's front end and a reading of its tree tell."""

import pathlib
import re

from clang import cindex

LIBRARY = pathlib.Path(__file__).parent / "metal_check"
FLAGS = ["-x", "c++", "-std=c++14", "--target=x86_64-linux-gnu", "-ffreestanding", "-nostdinc", f"-I{LIBRARY}",
         "-ferror-limit=0", "-Wno-unknown-attributes", "-Werror=return-type", "-Wno-unused-value"]  # fmt: skip
GROUP_MEMORY = re.compile(r"threadgroup (\w+) (\w+)\[(\d+)\];")
HOST_NAME = re.compile(r'\ntemplate \[\[host_name\("\w+"\)\]\] \[\[kernel\]\]')
MOST_GROUP_MEMORY, MOST_BUFFERS = 32_768, 31
SPACES = {"device", "constant", "threadgroup", "thread", "VQ_IN", "VQ_OUT", "VQ_SHARED", "VQ_DEVICE", "VQ_THREAD"}
KINDS = cindex.CursorKind
DECLARATIONS = {KINDS.PARM_DECL, KINDS.VAR_DECL, KINDS.FIELD_DECL}
UNKNOWN = {  # to Metal
    KINDS.LAMBDA_EXPR: "a lambda", KINDS.CXX_NEW_EXPR: "new", KINDS.CXX_DELETE_EXPR: "delete",
    KINDS.CXX_THROW_EXPR: "throw", KINDS.CXX_TRY_STMT: "try", KINDS.GOTO_STMT: "goto", KINDS.ASM_STMT: "asm",
    KINDS.CXX_DYNAMIC_CAST_EXPR: "dynamic_cast", KINDS.CXX_TYPEID_EXPR: "typeid", KINDS.UNION_DECL: "a union",
}  # fmt: skip
POINTERS = {cindex.TypeKind.POINTER, cindex.TypeKind.LVALUEREFERENCE, cindex.TypeKind.RVALUEREFERENCE}


def complaints(text):
    """One line for each thing that is wrong with a text as MLX would compile it."""
    found = _sizes(text)
    # Clang lets no automatic variable have an address space and no attributes stand here; Metal wants both.
    text = GROUP_MEMORY.sub(r"static threadgroup \1 \2[\3];", text)
    text = "#include <metal_stdlib>\n" + re.sub(
        r'\ntemplate \[\[host_name\("\w+"\)\]\] \[\[kernel\]\]', "\ntemplate", text
    )
    unit = cindex.Index.create().parse("kernel.cpp", FLAGS, [("kernel.cpp", text)])
    found += [
        f"line {d.location.line}: {d.spelling}" for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Error
    ]
    for cursor in unit.cursor.walk_preorder():
        if cursor.location.file and cursor.location.file.name == "kernel.cpp":
            found += [f"line {cursor.location.line}: {told}" for told in _read(cursor, text)]
    return sorted(set(found))


def _sizes(text):
    head, body = text.split("[[kernel]] void", 1)
    found = ["threadgroup memory outside of a kernel"] if GROUP_MEMORY.search(head) else []
    sizes = {"float4": 16, "float": 4, "half": 2}
    used = sum(sizes[kind] * int(count) for kind, _, count in GROUP_MEMORY.findall(body))
    if used > MOST_GROUP_MEMORY:
        found.append(f"{used} bytes of threadgroup memory")
    if body.count("[[buffer(") > MOST_BUFFERS:
        found.append(f"{body.count('[[buffer(')} buffers")
    return found


def _kind(kind_of):
    try:
        return kind_of.kind
    except ValueError:  # half and bfloat are newer than the bindings
        return None


def _read(cursor, text):
    kind = _kind(cursor.type)
    if cursor.kind in UNKNOWN:
        yield f"Metal has no {UNKNOWN[cursor.kind]}"
    if kind in (cindex.TypeKind.DOUBLE, cindex.TypeKind.LONGDOUBLE):
        yield f"Metal has no double: {cursor.spelling}"
    if kind in (cindex.TypeKind.VARIABLEARRAY, cindex.TypeKind.INCOMPLETEARRAY):
        yield f"an array without a constant size: {cursor.spelling}"
    if cursor.kind in DECLARATIONS:
        yield from _declaration(cursor, text)
    if cursor.kind == KINDS.CSTYLE_CAST_EXPR and kind == cindex.TypeKind.POINTER:
        source = list(cursor.get_children())[-1].type
        if _kind(source) == cindex.TypeKind.POINTER and _space(source) != _space(cursor.type):
            yield "a cast to another address space"


def _space(pointer):
    return pointer.get_pointee().get_address_space()


def _declaration(cursor, text):
    words = []
    for token in cursor.get_tokens():
        if token.spelling in ("=", "{"):
            break
        words.append(token.spelling)
    # `thread` is nothing to Clang, so it is not a part of the declaration.
    before = text[: cursor.extent.start.offset].split()[-1:]
    written = " ".join(before + words)
    if re.search(r"[*&]", " ".join(words)) and not SPACES & set(re.findall(r"\w+", written)):
        yield f"no address space: {written}"
    outside = cursor.semantic_parent and cursor.semantic_parent.kind in (KINDS.TRANSLATION_UNIT, KINDS.NAMESPACE)
    if cursor.kind == KINDS.VAR_DECL and outside and "constant" not in words:
        yield f"a variable outside of functions that is not constant: {written}"
