"""The oldest dependencies that pyproject.toml allows, as pip takes them, for the tests that are run with them.

python tests/oldest_dependencies.py            mlx[cpu]==... mlx-lm==... ...
python tests/oldest_dependencies.py --tests    the tests: quick ones that use each dependency
"""

import pathlib
import re
import sys
import tomllib

TESTS = ("test_public_names", "test_attach", "test_saved_caches", "test_storage", "test_rotation_files")


def oldest():
    """name==version of each runtime dependency at its lower bound."""
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [re.sub(r">=([\d.]+).*", r"==\1", requirement) for requirement in wanted]


if __name__ == "__main__":
    print(*([f"tests/{name}.py" for name in TESTS] if "--tests" in sys.argv else oldest()))
