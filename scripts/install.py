"""Installs what was built: PREFIX/bin/arete-*, libtorch in PREFIX/lib/arete, recipes and data in PREFIX/share/arete.

usage: install.py PREFIX [BINARIES]

BINARIES is the folder they were built in (target/release). The programs find libtorch by a path relative to their own, so that PREFIX may be moved
as a whole and needs no checkout; the path that the build wrote into them is overwritten in place (it is longer).
"""

import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBTORCH = ROOT / ".deps/libtorch"
BUILT_IN = b"$ORIGIN/../../.deps/libtorch/torch/lib:$ORIGIN/../../../.deps/libtorch/torch/lib"
INSTALLED = b"$ORIGIN/../lib/arete/torch/lib"


def replace(target, copy):
    """Makes `target` anew beside itself, then renames: programs that run keep the old one."""
    fresh = target.with_name(target.name + ".new")
    if fresh.is_dir():
        shutil.rmtree(fresh)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    copy(fresh)
    if target.is_dir():
        shutil.rmtree(target)
    fresh.rename(target)


def install_program(program, target):
    contents = program.read_bytes()
    n = contents.count(BUILT_IN)
    if n != 1:
        sys.exit(f"{program}: the path of libtorch ({BUILT_IN.decode()}) stands in it {n} times, expected once; build it with `make build`")
    contents = contents.replace(BUILT_IN, INSTALLED + b"\0" * (len(BUILT_IN) - len(INSTALLED)))

    def write(path):
        path.write_bytes(contents)
        path.chmod(0o755)

    replace(target, write)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    prefix = pathlib.Path(sys.argv[1]).absolute()
    built = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else ROOT / "target/release"
    programs = [path for path in sorted(built.glob("arete*")) if path.is_file() and not path.suffix]
    if not programs:
        sys.exit(f"{built}: no programs there; run `make build`")
    for program in programs:
        install_program(program, prefix / "bin" / program.name)
    libraries = lambda folder, names: [name for name in names if not (pathlib.Path(folder) / name).is_dir() and ".so" not in name]
    for part in ("torch/lib", "nvidia"):
        if (LIBTORCH / part).is_dir():
            replace(prefix / "lib/arete" / part, lambda path: shutil.copytree(LIBTORCH / part, path, ignore=libraries))
    for folder in ("recipes", "data"):
        replace(prefix / "share/arete" / folder, lambda path: shutil.copytree(ROOT / folder, path))
    print(f"{len(programs)} programs in {prefix}/bin, libtorch in {prefix}/lib/arete, recipes and data in {prefix}/share/arete")


if __name__ == "__main__":
    main()
