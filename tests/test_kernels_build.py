"""Finding, building, caching and loading the kernels: one clear outcome whatever the machine is like.

The compiler's own work is tested wherever nvcc is; what surrounds it is tested everywhere, with a stand-in compiler.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxfuse.kernels import abi, build, loader

NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA kernels are NOT compiled here")


#: compiles with the C++ compiler; `-c` and the link are told apart by the arguments
STAND_IN = """#!{python}
import subprocess, sys, time
args = sys.argv[1:]
if args == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.1"); sys.exit()
with open({log!r}, "a") as log: log.write(args[-1] + "\\n")
time.sleep({delay})
{before}
keep = [a for a in args if not a.startswith(("-gencode", "-X", "-cudart", "--threads", "--compress"))]
keep = [a for pair in keep for a in (["-x", "c++", pair, "-x", "none"] if pair.endswith(".cu") else [pair])]
sys.exit(subprocess.call(["c++", "-fPIC", *keep]))
"""

PLAIN = """
extern "C" const char* fxfuse_error_name(int code) { return code == 1 ? "cudaErrorInvalidValue" : "cudaSuccess"; }
extern "C" const char* fxfuse_error_string(int) { return "invalid argument"; }
extern "C" int fxfuse_twice(int x, int* out) { *out = 2 * x; return x < 0 ? 1 : 0; }
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, no prebuilt library, and a loader that has not looked yet."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "PREBUILT", tmp_path / "prebuilt")
    before = loader._loaded, loader._why
    loader.reset()
    yield
    loader._loaded, loader._why = before


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in nvcc over a folder of one small source; returns the log of its calls."""
    return stand_in(tmp_path, monkeypatch)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, delay: float = 0.0, before: str = "") -> Path:
    log, kernels = folder / "calls", folder / "kernels"
    kernels.mkdir(exist_ok=True)
    (kernels / "tiny.cu").write_text(PLAIN)
    nvcc = folder / "nvcc"
    nvcc.write_text(STAND_IN.format(python=sys.executable, log=str(log), delay=delay, before=before))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    build.nvcc_version.cache_clear()
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(build.build, "__kwdefaults__", {**build.build.__kwdefaults__, "kernels": kernels})
    monkeypatch.setattr(build.source_key, "__defaults__", (kernels,))
    return log


def twice(library: loader.Library, x: int) -> int:
    out = ctypes.c_int()
    library.function("fxfuse_twice", [ctypes.c_int, ctypes.c_void_p])(x, ctypes.addressof(out))
    return out.value


def one_warning(about: str) -> loader.Library | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = loader.library()
        assert loader.library() is found
    ours = [str(w.message) for w in caught if str(w.message).startswith("fxfuse")]
    assert len(ours) == 1 and about in ours[0], ours
    return found


# --- the real compiler ------------------------------------------------------------------------------------------------

#: Serialized, for the accumulators are read before they are waited for.
SERIALIZED = r"""
#include <cstdint>
__global__ void f(float* out, uint64_t a, uint64_t b) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  for (int i = 0; i < 2; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;");
    d[0] += 1.f;
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) out[i] = d[i];
#endif
}
"""


@needs_nvcc
@pytest.mark.parametrize("target", build.TARGETS)
def test_kernels_compile_for_every_target(target: str, tmp_path: Path) -> None:
    sources = [path for path in build.sources() if path.name in ("runtime.cu", "scale_unless_one.cu")]
    assert sources
    for path in sources:
        out = tmp_path / f"{path.stem}.o"
        subprocess.run([str(NVCC), *build.FLAGS, f"-gencode={target}", "-c", "-o", str(out), str(path)], check=True)
        assert out.stat().st_size > 1000


@needs_nvcc
def test_all_sources_build_into_one_library_for_both_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the usual cache folder, so that this costs its minutes once for a state of the sources."""
    monkeypatch.delenv("FXFUSE_CACHE_DIR")
    found = loader.library()
    assert found is not None, loader.why_unavailable()
    record = json.loads((found.path.parent / build.RECORD).read_text())
    assert all(any(target in made for made in record["targets"]) for target in ("sm_80", "sm_90a", "compute_80"))
    assert not record.get("serialized"), "ptxas found too few registers for a product's pipeline"
    for name in ("kl_div_forward", "kl_div_backward", "distillation_kl", "scale_unless_one"):
        found.function(f"fxfuse_{name}", [])  # AttributeError where it is missing


@needs_nvcc
def test_products_that_wait_for_each_other_are_seen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An accumulator that is read between two wgmma instructions, before the first is waited for."""
    (tmp_path / "slow.cu").write_text(SERIALIZED)
    build.build(tmp_path / "out" / "entry", progress=None, kernels=tmp_path)
    assert json.loads((tmp_path / "out" / "entry" / build.RECORD).read_text())["serialized"] == ["slow.cu"]
    assert "slow.cu: ptxas has" in capfd.readouterr().err


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text("__global__ void f() { does_not_exist(); }")
    with pytest.raises(build.BuildError, match=r"wrong\.cu failed(.|\n)*does_not_exist"):
        build.build(tmp_path / "out" / "entry", progress=None, kernels=tmp_path)
    assert not list((tmp_path / "out").iterdir())


# --- the loader -------------------------------------------------------------------------------------------------------


def test_builds_once_then_loads_from_the_cache(compiler: Path) -> None:
    first = loader.library()
    assert first is not None and first.origin == "built now" and twice(first, 21) == 42
    calls = compiler.read_text()
    loader.reset()
    second = loader.library()
    assert second is not None and second.origin == "cache" and twice(second, 4) == 8
    assert compiler.read_text() == calls
    assert not [p for p in loader.cache_dir().iterdir() if p.name.startswith(".building")]


def test_a_code_that_is_not_zero_is_an_error_with_its_name(compiler: Path) -> None:
    found = loader.library()
    assert found is not None
    with pytest.raises(RuntimeError, match=r"fxfuse_twice: cudaErrorInvalidValue \(1\): invalid argument"):
        twice(found, -1)
    with pytest.raises(AttributeError):
        found.function("fxfuse_no_such_function", [])


def test_prebuilt_comes_first_but_only_from_these_sources(compiler: Path) -> None:
    build.build(loader.PREBUILT, progress=None)
    found = loader.library()
    assert found is not None and found.origin == "prebuilt"
    loader.reset()
    record = json.loads((loader.PREBUILT / build.RECORD).read_text())
    (loader.PREBUILT / build.RECORD).write_text(json.dumps({**record, "source_key": "other"}))
    found = loader.library()
    assert found is not None and found.origin == "built now"


@pytest.mark.parametrize("damage", ["truncated", "other bytes", "no record"])
def test_a_damaged_cache_entry_is_built_again(compiler: Path, damage: str) -> None:
    found = loader.library()
    assert found is not None
    path = Path(os.path.realpath(found.path))
    loader.reset()
    data = path.read_bytes()
    path.unlink()  # the loaded file stays mapped: a new one takes its name
    path.write_bytes({"truncated": data[: len(data) // 2], "other bytes": data[:-1] + b"!", "no record": data}[damage])
    if damage == "no record":
        (path.parent / build.RECORD).unlink()
    again = one_warning("damaged")
    assert again is not None and again.origin == "built now" and twice(again, 3) == 6


def test_without_a_compiler_one_warning_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert one_warning("install the CUDA toolkit") is None
    assert "nvcc was not found" in str(loader.why_unavailable())


def test_without_a_compiler_a_cached_library_serves(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader.library() is not None
    loader.reset()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    found = loader.library()
    assert found is not None and found.origin == "cache"


def test_an_old_compiler_is_refused(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "11.8.89")
    assert one_warning("is CUDA 11.8.89; the kernels need 12.0 or newer") is None


def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, before="print('error: no such thing', file=sys.stderr); sys.exit(2)")
    assert one_warning("no such thing") is None
    assert [p.name for p in loader.cache_dir().iterdir()] == ["build.lock"]


def test_a_read_only_cache_folder(compiler: Path) -> None:
    loader.cache_dir().mkdir()
    if os.geteuid() == 0:  # root writes into read-only folders, but locks no folder as a file
        (loader.cache_dir() / "build.lock").mkdir()
    loader.cache_dir().chmod(0o500)
    found = one_warning("cannot be written")
    assert found is not None and twice(found, 5) == 10


def test_a_cache_folder_that_cannot_be_made(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = one_warning("cannot be written")
    assert found is not None and twice(found, 5) == 10
    assert not list(tmp_path.glob("fxfuse-*")), "the temporary folder stayed"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, before="print('ld: No space left on device', file=sys.stderr); sys.exit(1)")
    assert one_warning("point FXFUSE_CACHE_DIR at a folder with space") is None
    assert [p.name for p in loader.cache_dir().iterdir()] == ["build.lock"]


def test_two_processes_racing_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(tmp_path, monkeypatch, delay=0.4)
    script = textwrap.dedent(f"""
        from pathlib import Path
        from fxfuse.kernels import build, loader
        kernels = Path({str(tmp_path / "kernels")!r})
        build.build.__kwdefaults__["kernels"] = kernels
        build.source_key.__defaults__ = (kernels,)
        loader.PREBUILT = Path("none")
        print(loader.library().origin)
    """)
    racers = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    assert sorted(racer.communicate(timeout=300)[0].strip() for racer in racers) == ["built now", "cache"]
    assert len(log.read_text().splitlines()) == 2  # one source compiled, one library linked


def test_progress_is_shown(compiler: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loader.library()
    shown = capfd.readouterr().err
    assert "building CUDA kernels (0/1)" in shown and "CUDA kernels built (1 files" in shown


# --- the interface ----------------------------------------------------------------------------------------------------


def test_dtype_codes_are_those_of_the_header() -> None:
    header = (build.KERNELS / "common.cuh").read_text()
    for dtype, name in ((torch.float32, "kFloat32"), (torch.float16, "kFloat16"), (torch.bfloat16, "kBFloat16")):
        assert f"{name} = {abi.DTYPE_CODE[dtype]}" in header


def test_the_scratch_of_reductions_is_what_the_kernels_write() -> None:
    from fxfuse.kernels.kl_div import PARTIALS

    assert f"kMaxPartials = {PARTIALS};" in (build.KERNELS / "finish.cuh").read_text()


def test_the_key_follows_sources_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cu").write_text("1")
    first = build.source_key(tmp_path)
    assert build.source_key(tmp_path) == first
    (tmp_path / "b.cuh").write_text("1")
    second = build.source_key(tmp_path)
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    assert len({first, second, build.source_key(tmp_path)}) == 3
