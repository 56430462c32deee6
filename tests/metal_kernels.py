"""The Metal text that MLX would compile, taken from MLX on any machine, and run here against metal_shim/."""

import functools
import os
import re
import tempfile

import host_kernels
import mlx.core as mx

from vq_kvcache import kernels

LAUNCHED = kernels.run  # tests put others in its place
GROUP_MEMORY = re.compile(r"threadgroup (\w+) (\w+)\[(\d+)\];")
ARGUMENT = re.compile(r"  (?:const (?:device|constant) |device )(\w+)\* (\w+) \[\[buffer\(\d+\)\]\]")
INSTANCE = re.compile(r'\ntemplate \[\[host_name\("\w+"\)\]\] \[\[kernel\]\] decltype\((.*)\) \1;\n')
PLACES = {  # in the order of MLX's signature
    "thread_index_in_threadgroup": "uint(lane)",
    "threadgroup_position_in_grid": "uint3{uint(x), uint(y), uint(z)}",
}


def _key(array):
    return array.dtype, array.size < kernels.LEAST_INPUT, array.ndim


def text_of(launch):
    """What MLX would compile for this launch, without its own utilities."""
    key = (launch.body, launch.shared, launch.template, tuple(launch.output_dtypes), tuple(map(_key, launch.inputs)))
    return _dumped(key, _Held(launch))


class _Held:
    """A launch that a cache takes for equal to any other: its key says what counts."""

    def __init__(self, launch):
        self.launch = launch

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return isinstance(other, _Held)


@functools.cache
def _dumped(_key, held):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "told")
        out = os.open(path, os.O_RDWR | os.O_CREAT)
        before = os.dup(1)
        os.dup2(out, 1)
        try:
            mx.export_function(os.path.join(folder, "graph"), lambda: LAUNCHED(held.launch, "metal", verbose=True))
        finally:
            os.dup2(before, 1)
            os.close(before)
            os.close(out)
        with open(path, encoding="utf-8") as told:
            return told.read().split("```\n")[1]


def source_of(launch):
    """A C++ program with one function, `run(inputs, outputs)`."""
    text = text_of(launch)
    (instance,) = INSTANCE.findall(text)
    arguments = ARGUMENT.findall(text)
    assert tuple(name for _, name in arguments) == (*launch.body.inputs, *launch.body.outputs)
    given = [f"({kind}*){'in' if i < len(launch.inputs) else 'out'}[{i % len(launch.inputs)}]"
             for i, (kind, _) in enumerate(arguments)]  # fmt: skip
    given += [value for name, value in PLACES.items() if f"[[{name}]]" in text]
    text = GROUP_MEMORY.sub(r"\1* \2 = (\1*)vq_shim_group_memory(\3 * sizeof(\1));", INSTANCE.sub("\n", text))
    return f"""#include <metal_stdlib>
{text}
extern "C" void run(void** in, void** out) {{
  const int* groups = (const int*)in[{len(launch.inputs)}];
  for (int z = 0; z < groups[2]; ++z)
    for (int y = 0; y < groups[1]; ++y)
      for (int x = 0; x < groups[0]; ++x) {{
        vq_shim_poison();
        VqFibers({launch.threads}, [&](int lane) {{ {instance}({", ".join(given)}); }});
        vq_shim_check();
      }}
}}
"""


def run(launch):
    """The outputs as MLX arrays."""
    return host_kernels.run(launch, source_of)
