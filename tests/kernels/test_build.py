"""The build of the kernel libraries: what is left out is said, a required library is an error, the rest compiles."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gates import cuda_resources
from refsam_kernels import build, prerequisites
from refsam_kernels.core import libraries


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without compiler and nvcc, and without wishes about CUDA; the folder that its search path names."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "REFSAM_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "build_root", lambda: tmp_path / "objects")
    return tools


def report(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / build.REPORT).read_text())


def test_no_compiler_leaves_the_library_out(bare: Path, tmp_path: Path) -> None:
    target = tmp_path / "package"
    assert build.build_all(target) == [target / build.REPORT]
    assert (
        report(target)["_C_cpu"]["reason"] == "no C++ compiler found (looked for c++, g++, clang++)"
    )


def test_no_torch_leaves_everything_out(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prerequisites, "find_torch", lambda: None)
    target = tmp_path / "package"
    build.build_all(target)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("left out: torch is not installed" in line for line in lines)


def test_loaded_by_its_path_it_imports_no_torch(bare: Path, tmp_path: Path) -> None:
    """As setup.py loads it: under build isolation there is no torch, and the package needs one."""
    code = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("refsam_kernels_build", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.build_all(pathlib.Path(sys.argv[2]))
assert not {"torch", "refsam_kernels"} & set(sys.modules)
"""
    target = tmp_path / "package"
    command = [sys.executable, "-P", "-c", code, build.__file__, str(target)]
    subprocess.run(command, check=True)
    assert report(target)["_C_cpu"]["built"] is False


def test_old_torch_leaves_everything_out(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prerequisites, "find_torch", lambda: prerequisites.Torch(Path(), "2.9.1+cpu", False)
    )
    with pytest.raises(
        prerequisites.BuildSkipped, match=r"torch is 2\.9\.1\+cpu, the stable ABI needs 2\.10"
    ):
        prerequisites.supported_torch()


def test_required_cuda_without_nvcc_is_an_error(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFSAM_BUILD_CUDA", "1")
    monkeypatch.setattr(prerequisites, "find_compiler", lambda: ("c++",))
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(
        prerequisites.BuildError, match="_C_cuda is required and cannot be built: no nvcc"
    ):
        build.build_all(tmp_path / "package")


def test_forbidden_cuda_is_left_out(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFSAM_BUILD_CUDA", "0")
    with pytest.raises(prerequisites.BuildSkipped, match="REFSAM_BUILD_CUDA is 0"):
        build.wanted_cuda_plan()


def test_unknown_wish_is_rejected(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFSAM_BUILD_CUDA", "yes")
    with pytest.raises(
        prerequisites.BuildError, match="REFSAM_BUILD_CUDA: got 'yes', wanted 0, 1 or nothing"
    ):
        build.build_mode()


def script(path: Path, text: str) -> Path:
    """A program that runs in a shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("fault", ["broken compiler", "no compiler", "no torch"])
@pytest.mark.parametrize("sources", ["same", "other"])
def test_a_library_that_was_there_is_never_lost(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, sources: str
) -> None:
    """It stays where its sources are still those of the package, else it is set aside."""
    if fault == "broken compiler":
        script(bare / "c++", "echo this compiler is broken\nexit 1")
    elif fault == "no torch":
        monkeypatch.setattr(prerequisites, "find_torch", lambda: None)
    target = tmp_path / "package"
    target.mkdir()
    earlier = target / "_C_cpu.so"
    earlier.write_text("earlier")
    is_same = sources == "same"
    entry = {"built": True, "sources": build.sources_hash() if is_same else "0"}
    build.write_report(target, {"_C_cpu": entry})
    files = build.build_all(target)
    kept = earlier if is_same else target / "_C_cpu.outdated"
    assert kept.read_text() == "earlier"
    assert earlier.exists() == is_same == report(target)["_C_cpu"]["built"] == (earlier in files)


@pytest.mark.parametrize(
    ("value", "command"),
    [
        ("g++", ["g++"]),
        ("ccache g++", ["ccache", "g++"]),
        ("g++ -m64 -O1", ["g++", "-m64", "-O1"]),
        ("ccache g++ -m64", ["ccache", "g++", "-m64"]),
        ("{tools}/with space/g++", ["with space/g++"]),
        ("'{tools}/with space/g++' -m64", ["with space/g++", "-m64"]),
    ],
)
def test_cxx_with_a_launcher_and_arguments(
    bare: Path, monkeypatch: pytest.MonkeyPatch, value: str, command: list[str]
) -> None:
    for name in ("g++", "ccache", "with space/g++"):
        script(bare / name, "echo compiler 1.0")
    monkeypatch.setenv("CXX", value.format(tools=bare))
    wanted = tuple(word if word.startswith("-") else str(bare / word) for word in command)
    assert prerequisites.find_compiler() == wanted
    torch = prerequisites.Torch(bare, "2.11.0", False)
    monkeypatch.setattr(prerequisites, "supported_torch", lambda: torch)
    steps = build.cpu_plan().compile
    assert all(step.command.count(str(bare / "ccache")) == 1 for step in steps)
    assert all(set(wanted) <= set(step.command) for step in steps)


@pytest.mark.parametrize("value", ["ccache", "missing", "ccache missing", "g++ missing"])
def test_cxx_that_is_no_compiler(bare: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in ("g++", "ccache"):
        script(bare / name, "")
    monkeypatch.setenv("CXX", value)
    with pytest.raises(
        prerequisites.BuildSkipped, match=re.escape(f"compiler found (looked for {value})")
    ):
        prerequisites.find_compiler()


@pytest.mark.parametrize("place", ["user site", "base"])
@pytest.mark.parametrize("settings", ["true", "false", None])
def test_torch_outside_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, settings: str | None
) -> None:
    """In the user site, or of the Python below one that has its packages; `settings` None: no virtual environment."""
    prefix, packages = tmp_path / "prefix", tmp_path / "packages"
    prefix.mkdir()
    if settings is not None:
        (prefix / "pyvenv.cfg").write_text(f"include-system-site-packages = {settings}\n")
    (packages / "torch" / "include").mkdir(parents=True)
    text = "__version__ = '2.10.0+cu128'\ncuda: Optional[str] = '12.8'\n"
    (packages / "torch" / "version.py").write_text(text)
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(prerequisites.sys, "prefix", str(prefix))
    monkeypatch.setattr(
        prerequisites.importlib.util, "find_spec", lambda name: None
    )  # as in isolation
    monkeypatch.setattr(prerequisites.sysconfig, "get_path", lambda name: nowhere)
    user, base = (str(packages) if place == each else nowhere for each in ("user site", "base"))
    monkeypatch.setattr(prerequisites.site, "getusersitepackages", lambda: user)
    monkeypatch.setattr(prerequisites.site, "getsitepackages", lambda prefixes: [base])
    found = prerequisites.find_torch()
    if settings == "false":
        assert found is None
    else:
        assert found == prerequisites.Torch(packages / "torch", "2.10.0+cu128", False, "12.8")


@pytest.mark.parametrize(
    ("nvcc", "torch", "refused"),
    [
        ("13.0", "12.8", True),
        ("12.4", "13.0", True),
        ("13.0", "13.0", False),
        ("12.4", "12.8", False),
        ("13.0", "", False),
    ],
)
def test_nvcc_of_another_cuda_is_refused(nvcc: str, torch: str, refused: bool) -> None:
    version = f"Cuda compilation tools, release {nvcc}, V{nvcc}.88\n"
    of_torch = prerequisites.Torch(Path(), "2.10.0", True, torch)
    if not refused:
        prerequisites.refuse_other_cuda(version, of_torch)
        return
    with pytest.raises(
        prerequisites.BuildSkipped, match=f"nvcc is of CUDA {nvcc}, torch 2.10.0 of CUDA {torch}"
    ):
        prerequisites.refuse_other_cuda(version, of_torch)


def test_a_folder_of_somebody_else_is_one_line(bare: Path, tmp_path: Path) -> None:
    """Where nothing may be written: here because a file stands in the folder's place, which stops root too."""
    (tmp_path / "package").write_text("")
    with pytest.raises(SystemExit) as stopped:
        build.main([], tmp_path / "package" / "below")
    message = str(stopped.value)
    assert message.startswith("refsam_kernels: ")
    assert str(tmp_path / "package") in message
    assert "\n" not in message


def fake_nvcc(folder: Path, codes: str) -> str:
    """An nvcc that knows the given codes only."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '{codes}'\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("9.0", ["9.0"]),
        ("8.0;9.0a", ["8.0", "9.0a"]),
        ("8.6 12.0+PTX", ["8.6", "12.0+PTX"]),
        ("8.0,8.9", ["8.0", "8.9"]),
    ],
)
def test_architecture_list_is_honoured(
    bare: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, names: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert prerequisites.architectures("unused") == names


def test_unknown_architecture_is_rejected(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(prerequisites.BuildError, match="TORCH_CUDA_ARCH_LIST: got 'Hopper'"):
        prerequisites.architectures("unused")


def test_default_architectures_lose_what_nvcc_does_not_know(bare: Path) -> None:
    old = fake_nvcc(bare, r"sm_80\nsm_86\nsm_89\nsm_90\n")
    assert prerequisites.architectures(old) == ["8.0", "8.6", "8.9", "9.0+PTX"]
    new = fake_nvcc(bare, r"sm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_120\n")
    assert prerequisites.architectures(new) == list(prerequisites.DEFAULT_ARCHITECTURES)


@pytest.mark.parametrize("arguments", [["--sanitize"], ["--sanitise", "folder"]])
def test_wrong_arguments_build_nothing(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        build.main(arguments, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_gencode_adds_ptx() -> None:
    assert prerequisites.gencode(["8.0", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_reason_of_the_report_reaches_the_user(tmp_path: Path) -> None:
    entry = {"_C_cpu": {"built": False, "reason": "no C++ compiler found"}}
    (tmp_path / build.REPORT).write_text(json.dumps(entry))
    assert libraries.why_not_built("_C_cpu", tmp_path) == "no C++ compiler found"
    assert libraries.why_not_built("_C_cuda", tmp_path) == "run python -m refsam_kernels.build"


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no-ninja"])
def test_build_is_incremental_with_ninja(
    ninja: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ninja a second build compiles nothing; without it everything is compiled again."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "source.cpp"
    source.write_text("int answer() { return 42; }\n")
    found = build.find_ninja()
    if ninja and found is None:
        pytest.skip("no ninja")
    monkeypatch.setattr(build, "find_ninja", lambda: found if ninja else None)
    output, depfile = tmp_path / "out" / "source.o", tmp_path / "out" / "source.d"
    command = (compiler, "-fPIC", "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output))
    step = build.Step(output, (source,), command, depfile)
    library = tmp_path / "out" / "library.so"
    link = build.Step(library, (output,), (compiler, "-shared", str(output), "-o", str(library)))
    plan = build.Plan("library", (step,), link, {})
    build.execute(plan)
    first = output.stat().st_mtime_ns
    build.execute(plan)
    assert library.is_file()
    assert (output.stat().st_mtime_ns == first) is ninja


def test_kernel_resources_reads_ptxas(tmp_path: Path) -> None:
    step = build.Step(tmp_path / "kernel.o", (), ())
    step.log.write_text(
        "ptxas info    : Compiling entry function 'scale' for 'sm_90'\n"
        "ptxas info    : Function properties for scale\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 0 barriers\n"
    )
    link = build.Step(tmp_path / "library.so", (), ())
    found = build.kernel_resources(build.Plan("library", (step,), link, {}))
    assert found == [build.KernelResources("scale", "sm_90", 72, 8, 12)]


def test_report_of_resources_refuses_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = build.Step(tmp_path / "scale.cu.o", (tmp_path / "scale.cu",), ())
    log = (
        "ptxas info    : Compiling entry function '_ZN4ours5scaleILi64EEEvPf' for 'sm_90'\n"
        "    16 bytes stack frame, {} bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 0 barriers\n"
    )
    plan = build.Plan("_C_cuda", (step,), step, {"compiler": "nvcc 13"})
    monkeypatch.setattr(build, "cuda_plan", lambda: plan)
    monkeypatch.setattr(build, "execute", lambda plan: None)
    out = tmp_path / "resources.json"
    for stores, code in ((32, 0), (33, 1)):
        step.log.write_text(log.format(stores))
        assert cuda_resources.main(["--out", str(out)]) == code
    (row,) = json.loads(out.read_text())["rows"]
    assert row["kernel"] == "scale<64>"
    assert (row["source"], row["architecture"], row["spill_bytes"]) == ("scale.cu", 90, 65)


@pytest.mark.slow
def test_cuda_library_compiles_for_every_architecture() -> None:
    """Needs nvcc, not a GPU: every architecture of the list is there and no kernel spills more than 64 bytes."""
    try:
        plan = build.cuda_plan()
    except prerequisites.BuildSkipped as reason:
        pytest.skip(str(reason))
    build.execute(plan)
    resources = build.kernel_resources(plan)
    wanted = {
        f"sm_{prerequisites.digits(name)}" for name in plan.toolchain["architectures"].split()
    }
    kernels = {kernel.kernel for kernel in resources}
    assert kernels
    assert {(k.kernel, k.architecture) for k in resources} == {
        (k, a) for k in kernels for a in wanted
    }
    assert not [k for k in resources if k.spill_stores + k.spill_loads > 64]
    assert_stable(plan.link.output)


def python_symbols(library: Path) -> list[str]:
    """The symbols of Python's C interface that a library uses or defines."""
    names = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    return [
        name for name in re.findall(r"\w+$", names, re.MULTILINE) if name.startswith(("Py", "_Py"))
    ]


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and name of a file's symbols, as nm tells them."""
    command = ["nm", *options, str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [tuple(line.split()[-2:]) for line in lines]  # type: ignore[misc]


def assert_stable(library: Path) -> None:
    """The libraries use torch's C functions of 2.10 alone, which keep their meaning between versions."""
    audit = pytest.importorskip("torch_abi_audit").inspect_extension(library)
    assert audit.torch.uses_torch
    assert audit.torch.stable, audit.torch.unstable_symbols
    assert audit.torch.min_torch_version == "2.10.0"
    assert not audit.torch.unknown_shim_symbols
    assert not python_symbols(library)


def test_cpu_library_uses_the_stable_abi_only() -> None:
    library = build.PACKAGE / "_C_cpu.so"
    if not library.is_file():
        pytest.skip(f"_C_cpu.so was not built: {libraries.why_not_built('_C_cpu')}")
    assert_stable(library)


def test_sources_for_an_instruction_set_share_no_function() -> None:
    """A function that other objects hold too could be linked in its AVX-512 version and run anywhere."""
    try:
        plan = build.cpu_plan()
    except prerequisites.BuildSkipped as reason:
        pytest.skip(str(reason))
    objects = [step.output for step in plan.compile if build.instruction_set(*step.inputs)]
    if not all(path.is_file() for path in objects):
        pytest.skip("the objects of the build are not there")
    for path in objects:
        names = [name for _, name in symbols(path, "--defined-only", "--extern-only")]
        assert len(names) == 1, names
        assert names[0].endswith("KernelsE")


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("a_b_avx2", "-mavx2"),
        ("a_avx512", "-mavx512f"),
        ("a_avx512bf16", "-mavx512bf16"),
        ("a_avxvnni", "-mavx2"),
        ("a_avx512vl", "-mavx2"),
        ("a_avx512vnni", "-mavx512vnni"),
    ],
)
def test_instruction_set_follows_from_the_name(
    monkeypatch: pytest.MonkeyPatch, name: str, flag: str
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert flag in build.instruction_set(Path(f"{name}.cpp"))
    assert build.instruction_set(Path("a_portable.cpp")) == []
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.instruction_set(Path(f"{name}.cpp")) == []
