"""Make an installed CUDA build of PyTorch work without NVIDIA's libraries (about 4 GB).

Run after ``pip install --no-deps torch``; needs binutils. The script changes two things, for
machines without a GPU:

- torch's libraries are linked to NVIDIA's. All of those are replaced by one small stub library,
  whose functions return "no CUDA-capable device", as the real ones do without a GPU.
- torch's metadata requires NVIDIA's packages. These requirements are removed.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

NO_DEVICE = 100  # cudaErrorNoDevice
STUB = "libnogpu.so"
SYSTEM = Path("/usr/lib/x86_64-linux-gnu")
PREFIXES = ("cu", "nccl", "nvrtc", "nvshmem")
ANSWERS_TEXT = re.compile(r"\w+(ErrorString|ErrorName|StatusString)|ncclGetLastError")


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def absent_libraries(libraries: list[Path]) -> set[str]:
    """Return the needed libraries that are neither in ``libraries`` nor in the system."""
    dynamic = output("readelf", "-d", *libraries)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    here = {library.name for library in libraries}
    return {name for name in needed if name not in here and not (SYSTEM / name).exists()}


def absent_symbols(libraries: list[Path], absent: set[str]) -> dict[str, str]:
    """Return NVIDIA's functions that the libraries call, with the symbol version of each, or ''."""
    wanted = {}
    for line in output("nm", "-D", "--undefined-only", *libraries).splitlines():
        kind, _, symbol = line.strip().partition(" ")
        name, _, version = symbol.partition("@")
        if kind == "U" and (version in absent or name.startswith(PREFIXES)):
            wanted[name] = version
    return wanted


def make_stub(folder: Path, symbols: dict[str, str], absent: set[str]) -> None:
    """Build one stub library with all symbols and versions, and link all absent names to it."""
    lines = [".text"]
    for name in symbols:
        lines += [f".globl {name}", f".type {name}, @function", f"{name}:"]
        answer = (
            "lea text(%rip), %rax" if ANSWERS_TEXT.fullmatch(name) else f"mov ${NO_DEVICE}, %eax"
        )
        lines += [answer, "ret"]
    lines += [".section .rodata", 'text: .asciz "no CUDA-capable device is detected"']
    lines += ['.section .note.GNU-stack, "", @progbits', ""]
    versions = [
        f"{version} {{ global: {' '.join(f'{n};' for n, v in symbols.items() if v == version)} }};"
        for version in sorted(set(symbols.values()) - {""})
    ]
    source, script, made = (Path("/tmp/stub" + end) for end in (".s", ".map", ".o"))
    source.write_text("\n".join(lines))
    script.write_text("\n".join(versions))
    output("as", "-o", made, source)
    link = ["ld", "-shared", f"--soname={STUB}", f"--version-script={script}"]
    output(*link, "-o", folder / STUB, made)
    for name in absent:
        (folder / name).symlink_to(STUB)
    for scratch in (source, script, made):
        scratch.unlink()


def forget_requirements(distribution: importlib.metadata.Distribution) -> None:
    """Remove torch's Linux-only requirements from its metadata: NVIDIA's packages and Triton."""
    metadata = next(
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or []
        if file.name == "METADATA"
    )
    lines = metadata.read_text().splitlines(keepends=True)
    linux_only = re.compile(r"Requires-Dist: .*platform_system == .Linux.")
    metadata.write_text("".join(line for line in lines if not linux_only.match(line)))


def main() -> None:
    torch = importlib.metadata.distribution("torch")
    folder = Path(str(torch.locate_file("torch/lib")))
    libraries = sorted(path for path in folder.iterdir() if ".so" in path.name)
    absent = absent_libraries(libraries)
    symbols = absent_symbols(libraries, absent)
    make_stub(folder, symbols, absent)
    forget_requirements(torch)
    print(f"{STUB} replaces {len(symbols)} functions of {', '.join(sorted(absent))}")


if __name__ == "__main__":
    main()
