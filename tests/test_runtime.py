# SPDX-License-Identifier: MIT
"""Fetching, patching and building llama.cpp, on a tiny stand-in for its tree: no network, no real build."""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gguf_splitq.errors import EnvironmentFailed, UsageError
from gguf_splitq.runtime import building, cache, fetching, installing, patching

PATCH = """Why: a test.

--- a/src/names.txt
+++ b/src/names.txt
@@ -1,3 +1,4 @@
 one
 two
+two and a half
 three
"""


@pytest.fixture
def source(tmp_path):
    """What stands for llama.cpp at the pin."""
    source = tmp_path / "source"
    for name, text in {"ggml/CMakeLists.txt": "project(ggml)\n", "src/names.txt": "one\ntwo\nthree\n"}.items():
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text(text)
    return source


@pytest.fixture
def commit(source):
    """Makes a git checkout of `source`; the commit's id."""
    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "pin")
    return git(source, "rev-parse", "HEAD")


@pytest.fixture
def patches(tmp_path, monkeypatch, source):
    """A patches/ folder for that source, an empty cache, and LLAMA_CPP_DIR on the source."""
    patches = tmp_path / "patches"
    (patches / "files" / "src").mkdir(parents=True)
    (patches / "files" / "src" / "own.c").write_text("int own;\n")
    (patches / "names.patch").write_text(PATCH)
    (patches / "series").write_text("# in order\nnames.patch\n")
    write_pin(patches, tree=patching.content_hash(source))
    monkeypatch.setattr(patching, "folder", lambda name: tmp_path / name)
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA_CPP_DIR", str(source))
    return patches


def write_pin(patches, **changes):
    pin = {"repository": str(patches.parent / "nowhere"), "commit": "0123456789abcdef", "sdist": "no-such-package==0"}
    pin |= {"sdist_sha256": "0" * 64, "sdist_folder": "vendor/llama.cpp"} | changes
    (patches / "PIN").write_text("# the pin\n" + "".join(f"{key} = {value}\n" for key, value in pin.items()))


def git(cwd, *args):
    return subprocess.run(["git", *args], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_fetch_patches_a_copy_and_leaves_the_source_alone(source, patches):
    before = patching.content_hash(source)
    tree = fetching.fetch()
    assert (tree / "src" / "names.txt").read_text() == "one\ntwo\ntwo and a half\nthree\n"
    assert (tree / "src" / "own.c").read_text() == "int own;\n"
    assert patching.content_hash(source) == before
    assert fetching.tree() == tree
    assert not list(cache.folder().glob("tmp-*"))


def test_fetch_takes_the_pinned_commit_of_a_checkout_not_its_edits(source, commit, patches):
    write_pin(patches, commit=commit, tree=git(source, "rev-parse", "HEAD^{tree}"))
    (source / "src" / "names.txt").write_text("edited\n")
    (source / "build").mkdir()
    (source / "build" / "big.o").write_text("x")
    tree = fetching.fetch()
    assert "two and a half" in (tree / "src" / "names.txt").read_text()
    assert not (tree / "build").exists()
    assert (source / "src" / "names.txt").read_text() == "edited\n"


def test_checkout_without_the_pinned_commit_is_refused(commit, patches):
    with pytest.raises(EnvironmentFailed, match="does not have commit 012345678; run `git fetch"):
        fetching.fetch()


def test_folder_that_differs_from_the_pin_is_refused(source, patches):
    (source / "src" / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(EnvironmentFailed, match="is not llama.cpp 012345678"):
        fetching.fetch()
    assert not list(cache.folder().glob("llama.cpp-*"))


def test_folder_without_llama_cpp_is_refused(tmp_path, patches, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "absent"))
    with pytest.raises(EnvironmentFailed, match="absent holds no llama.cpp source"):
        fetching.fetch()


def test_fetch_from_git(source, commit, patches, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_DIR")
    write_pin(patches, repository=source, commit=commit, tree=git(source, "rev-parse", "HEAD^{tree}"))
    tree = fetching.fetch()
    assert "two and a half" in (tree / "src" / "names.txt").read_text()
    assert not (tree / ".git").exists()


def test_no_source_at_all_names_each_and_the_next_step(patches, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP_DIR")
    for name in ("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(EnvironmentFailed) as caught:
        fetching.fetch()
    for part in ("nowhere", "no-such-package==0: ERROR", "LLAMA_CPP_DIR"):
        assert part in str(caught.value)


@pytest.fixture
def sdist(tmp_path, source):
    (source / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    archive = tmp_path / "package-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, "package-1/vendor/llama.cpp")
        tar.add(source / "src", "package-1/elsewhere")
    return archive


def test_source_package_gives_only_the_tree(tmp_path, sdist, patches):
    write_pin(patches, sdist_sha256=hashlib.sha256(sdist.read_bytes()).hexdigest())
    fetching.extract_sdist(sdist, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ggml", "src"]


def test_source_package_with_another_hash_is_refused(tmp_path, sdist, patches):
    with pytest.raises(EnvironmentFailed, match="package-1.tar.gz has SHA-256 .*, not 0000"):
        fetching.extract_sdist(sdist, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_package_with_another_hash_is_not_run(tmp_path, patches, monkeypatch):
    """pip runs a package's own build code to learn its metadata."""
    marker = tmp_path / "ran"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: package\nVersion: 1\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        "own.py": f"open({str(marker)!r}, 'w')\n",
    }
    for name, text in files.items():
        (tmp_path / "package-1").mkdir(exist_ok=True)
        (tmp_path / "package-1" / name).write_text(text)
    (tmp_path / "links").mkdir()
    with tarfile.open(tmp_path / "links" / "package-1.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "package-1", "package-1")
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    write_pin(patches, sdist="package==1")
    with pytest.raises(EnvironmentFailed, match="package==1 has another SHA-256 than the pinned 0000"):
        fetching.fetch()
    assert not marker.exists()


def test_apply_twice_is_a_no_op(source, patches):
    patching.apply(source)
    once = (source / "src" / "names.txt").read_text()
    patching.apply(source)
    assert (source / "src" / "names.txt").read_text() == once
    (patches / "names.patch").write_text(PATCH.replace("half", "quarter"))
    with pytest.raises(EnvironmentFailed, match="another patch series"):
        patching.apply(source)


@pytest.mark.parametrize("prepare", [fetching.fetch, fetching.patches_check])
def test_patch_with_other_context_is_refused_by_name(patches, prepare):
    (patches / "names.patch").write_text(PATCH.replace(" three", " THREE"))
    with pytest.raises(EnvironmentFailed, match="^names.patch does not apply .* regenerate patches/names.patch"):
        prepare()
    with pytest.raises(EnvironmentFailed, match="runtime fetch"):
        fetching.tree()


def test_missing_patch_is_named(patches):
    (patches / "series").write_text("names.patch\ngone.patch\n")
    with pytest.raises(EnvironmentFailed, match="gone.patch"):
        fetching.fetch()


def test_without_a_series_the_tree_is_upstreams(source, patches):
    shutil.rmtree(patches / "files")
    (patches / "series").unlink()
    assert (fetching.fetch() / "src" / "names.txt").read_text() == (source / "src" / "names.txt").read_text()


def test_patches_are_applied_inside_another_repository(tmp_path, patches, monkeypatch):
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert "two and a half" in (fetching.fetch() / "src" / "names.txt").read_text()


def test_patches_check_notices_an_altered_cache(patches):
    assert fetching.patches_check() == {"names.patch": 1}
    next(cache.folder().glob("llama.cpp-*/src/names.txt")).write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(EnvironmentFailed, match="cache.llama.cpp-012345678 is not llama.cpp"):
        fetching.patches_check()


def test_cache_key_follows_patches_and_files(patches):
    trees = [fetching.fetch()]
    for path in ("names.patch", "files/src/own.c"):
        (patches / path).write_text((patches / path).read_text().replace("own", "mine").replace("half", "quarter"))
        trees.append(fetching.fetch())
    assert len(set(trees)) == 3
    assert "quarter" in (trees[-1] / "src" / "names.txt").read_text()
    (patches / "PIN").write_text((patches / "PIN").read_text() + "# a remark\n")
    assert fetching.fetch() == trees[-1]


def test_concurrent_fetches_agree(patches):
    with ThreadPoolExecutor(4) as pool:
        trees = set(pool.map(lambda _: fetching.fetch(), range(4)))
    assert len(trees) == 1 and (trees.pop() / patching.STAMP).exists()


def test_full_disk_is_reported_before_anything_is_written(patches, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 30))
    with pytest.raises(EnvironmentFailed, match="1.0 GB free, and llama.cpp needs 2 GB"):
        fetching.fetch()


def test_unwritable_cache_is_reported(tmp_path, patches, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentFailed, match="set GGUF_SPLITQ_CACHE"):
        fetching.fetch()


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path, patches, monkeypatch):
    """Stand-ins for cmake, ninja and compilers; their arguments go to `calls`. Besides them PATH has only git."""
    tools = tmp_path / "tools"
    record = f'[ "$1" = --version ] && echo cmake version 3.25.1 && exit; echo "$(basename $0) $*" >> {tools}/calls'
    script(tools / "cmake", record)
    make = 'mkdir -p "$2/bin"; cd "$2/bin"; shift 4; echo "[1/1]"; touch libggml-base.so "$@"'
    make += f"; echo '#!/bin/sh\n. {tools}/self-test' > {building.SELF_TEST}; chmod +x {building.SELF_TEST}"
    (tools / "self-test").write_text("exit 0\n")
    script(tools / "ninja", f"{record}; {make}")
    for name in ("cc", "c++"):
        script(tools / name, "exit 0")
    for name in ("git", "sh", "basename", "mkdir", "touch", "chmod", "grep"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(building.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(building, "_without_amx", lambda cc: [])
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return tools


def calls(tools):
    return (tools / "calls").read_text().splitlines()


def test_build_once_and_add_the_tests_when_asked(tools):
    assert building.library() is None
    folder = building.build()
    assert building.path() == folder and building.program("llama-perplexity").parent == folder
    assert building.library() == folder / "libggml-base.so"
    with pytest.raises(EnvironmentFailed, match="test-gguf is not in"):
        building.program("test-gguf")
    assert len(calls(tools)) == 2
    building.build()
    assert len(calls(tools)) == 2
    building.build(tests=True)
    assert building.program("test-gguf").exists()
    building.build()
    assert len(calls(tools)) == 4


def test_build_is_not_used_on_another_processor(tools, monkeypatch):
    building.build()
    monkeypatch.setattr(cache, "processor", lambda: "another")
    with pytest.raises(EnvironmentFailed, match="is not built"):
        building.path()


def test_build_downloads_nothing(tools):
    building.build()
    for option in ("LLAMA_USE_PREBUILT_UI=OFF", "FETCHCONTENT_FULLY_DISCONNECTED=ON", "GGML_NATIVE=ON"):
        assert f"-D{option}" in calls(tools)[0]


@pytest.mark.parametrize("fault, cause", [("kill -ILL $$", "killed by SIGILL"), ("echo q8_0: wrong; exit 1", "q8_0: ")])
def test_a_build_whose_products_are_wrong_is_made_again_without_amx(tools, monkeypatch, capfd, fault, cause):
    monkeypatch.setattr(building, "_without_amx", lambda cc: building.NO_AMX)
    monkeypatch.setenv("CFLAGS", "-g1")
    (tools / "self-test").write_text(f"grep -q mno-amx-tile {tools}/calls && exit 0\n{fault}\n")
    building.build()
    first, _, second, _ = calls(tools)
    assert "amx" not in first
    assert "-DCMAKE_C_FLAGS=-g1 -mno-amx-tile -mno-amx-int8 -mno-amx-bf16" in second
    assert "-DCMAKE_CXX_FLAGS=-mno-amx-tile" in second
    said = capfd.readouterr().err
    assert cause in said and "building it again without AMX" in said


@pytest.mark.parametrize("flags", [[], building.NO_AMX], ids=["no AMX to leave out", "also without AMX"])
def test_a_build_whose_products_stay_wrong_is_not_used(tools, monkeypatch, flags):
    monkeypatch.setattr(building, "_without_amx", lambda cc: flags)
    (tools / "self-test").write_text("echo sq4 times 5 tokens in CPU: error 0.5 of the result; exit 1\n")
    with pytest.raises(EnvironmentFailed, match="fails its self-test .*sq4 times 5 tokens.*set CC and CXX"):
        building.build()
    with pytest.raises(EnvironmentFailed, match="is not built"):
        building.path()
    (tools / "self-test").write_text("exit 0\n")
    building.build()


def test_failed_build_shows_the_end_of_its_log_and_is_not_taken_for_a_build(tools, capfd):
    script(tools / "ninja", '[ "$1" = --version ] && echo 1.11 && exit; echo "fatal: no such thing"; exit 3')
    with pytest.raises(EnvironmentFailed, match="Building llama.cpp failed with exit code 3; see .*log"):
        building.build()
    assert "fatal: no such thing" in capfd.readouterr().err
    with pytest.raises(EnvironmentFailed, match="is not built; run `gguf-splitq runtime build`"):
        building.path()
    assert building.library() is None


@pytest.mark.parametrize(
    "missing, message",
    [
        ("c++", "A C\\+\\+ compiler was not found.*install one"),
        ("cc", "A C compiler was not found.*install one"),
        ("cmake", "cmake 3.18 or newer was not found.*pip install cmake"),
        ("ninja", "ninja was not found.*pip install ninja"),
        ("git", "git is not installed.*install git"),
    ],
)
def test_missing_tool_is_named(tools, missing, message):
    (tools / missing).unlink()
    with pytest.raises(EnvironmentFailed, match=message):
        building.build()


def test_old_cmake_gives_way_to_the_one_beside_python(tmp_path, tools):
    script(tools / "cmake", "echo cmake version 3.16.3")
    with pytest.raises(EnvironmentFailed, match="cmake 3.18 or newer"):
        building.build()
    newer = script(tmp_path / "bin" / "cmake", "echo cmake version 4.1.0")
    assert building._tool("cmake") == str(newer)


def test_compiler_named_by_the_user(tools, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(EnvironmentFailed, match="CXX=no-such-compiler -O1 was not found"):
        building.build()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("knows", [True, False])
def test_flags_against_amx_are_for_processors_and_compilers_that_know_it(tmp_path, monkeypatch, listed, knows):
    monkeypatch.setattr(building.platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2 amx_tile\n" if listed else "flags : avx2\n")
    cc = script(tmp_path / "tools" / "cc", f"exit {1 - knows}")
    assert building._without_amx(str(cc), cpuinfo) == (building.NO_AMX if listed and knows else [])


def test_the_real_pin_is_complete():
    pin = patching.pin()
    assert len(bytes.fromhex(pin["sdist_sha256"])) == 32
    assert len(pin["commit"]) >= 9 and "==" in pin["sdist"] and pin["sdist_folder"]
    assert all(path.is_file() for path in patching.series())


def test_cache_folder_variables(monkeypatch):
    monkeypatch.delenv("GGUF_SPLITQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    assert cache.folder() == Path("/xdg/gguf-splitq")
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", "/elsewhere")
    assert cache.folder() == Path("/elsewhere")


def test_a_copy_that_fails_names_the_first_file(tmp_path):
    (tmp_path / "source").mkdir()
    for name in "abc":
        os.mkfifo(tmp_path / "source" / name)
    with pytest.raises(OSError, match=r"named pipe.*, and 2 more"):
        fetching.copy(tmp_path / "source", tmp_path / "target")


def test_the_unpatched_build_is_another_one_and_made_once(tools):
    folder = building.build_unpatched("llama-perplexity")
    assert (folder / "llama-perplexity").exists() and "unpatched" in str(folder)
    assert not (folder.parents[1] / "llama.cpp" / "src" / "own.c").exists()
    building.build_unpatched("llama-perplexity")
    assert len(calls(tools)) == 2
    building.build()
    assert len(calls(tools)) == 4 and building.path() != folder


def test_the_unpatched_build_has_no_amx_that_nothing_tests(tools, monkeypatch):
    monkeypatch.setattr(building, "_without_amx", lambda cc: building.NO_AMX)
    building.build_unpatched("llama-perplexity")
    assert "-DCMAKE_C_FLAGS=-mno-amx-tile" in calls(tools)[0]


@pytest.fixture
def built(source, tools):
    """The stand-in built, of a source with licences."""
    (source / "licenses").mkdir()
    for name in ("LICENSE", "licenses/LICENSE-part"):
        (source / name).write_text(f"{name} of upstream\n")
    write_pin(tools.parent / "patches", tree=patching.content_hash(source))
    return building.build()


def test_an_installed_build_has_all_that_runs_and_replaces_only_its_like(tmp_path, built):
    (built / "libggml-base.so").rename(built / "libggml-base.so.1")
    (built / "libggml-base.so").symlink_to("libggml-base.so.1")
    (built / "test-backend-ops").touch()
    target = tmp_path / "to" / "here"
    assert installing.install(target) == target / "bin"
    assert {path.name for path in (target / "bin").iterdir()} == {
        *building.PROGRAMS, "libggml-base.so", "libggml-base.so.1"
    }  # fmt: skip
    assert os.readlink(target / "bin" / "libggml-base.so") == "libggml-base.so.1"
    assert (target / "LICENSE-llama.cpp").read_text() == "LICENSE of upstream\n"
    assert (target / "LICENSE-part").exists() and "MIT License" in (target / "LICENSE").read_text()
    with pytest.raises(UsageError, match="here: there is already a llama.cpp: pass --overwrite"):
        installing.install(target)
    (target / "bin" / "old").touch()
    installing.install(target, overwrite=True)
    assert not (target / "bin" / "old").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    with pytest.raises(UsageError, match="other: there is something else in this folder"):
        installing.install(tmp_path / "other", overwrite=True)
    with pytest.raises(UsageError, match="precious: not a folder"):
        installing.install(tmp_path / "other" / "precious")
    with pytest.raises(EnvironmentFailed, match="cannot be written"):
        installing.install(tmp_path / "other" / "precious" / "below")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["here"]


def test_an_archive_is_built_for_all_processors_and_comes_out_the_same(tmp_path, built, tools, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = installing.archive()
    assert first.name == f"{installing.name()}.tar.gz" and cache.pin9() in first.name
    configure = calls(tools)[-2]
    for option in ("GGML_NATIVE=OFF", "GGML_BACKEND_DL=ON", "GGML_CPU_ALL_VARIANTS=ON", "CMAKE_BUILD_TYPE=Release"):
        assert f"-D{option}" in configure.split()
    assert "build-portable" in configure and building.path() == built
    count = len(calls(tools))
    for path in (cache.home() / "build-portable").rglob("*"):
        os.utime(path, (1, 1))
    assert installing.archive("again").read_bytes() == first.read_bytes()
    assert len(calls(tools)) == count
    with tarfile.open(first) as tar:
        names = {entry.name: entry for entry in tar}
    assert names["build/bin/llama-server"].mode & 0o111 == 0 == names["build/LICENSE"].mtime  # touched, not linked here
    assert {f"build/bin/{name}" for name in building.PROGRAMS} < set(names)
    assert not {entry.uid for entry in names.values()} - {0}
    with pytest.raises(UsageError, match="there is already a file: pass --overwrite"):
        installing.archive()
    assert installing.archive(overwrite=True) == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_both_branches_for_compilers_define_the_same_macros():
    """A macro that only GNU compilers get is missed nowhere else until somebody builds there."""
    block = re.compile(r"^#if defined\(__GNUC__\)$(.*?)^#else$(.*?)^#endif$", re.MULTILINE | re.DOTALL)
    found = 0
    for path in patching.files().values():
        for branches in block.findall(path.read_text()):
            gnu, others = (set(re.findall(r"^#define (\w+)", branch, re.MULTILINE)) for branch in branches)
            assert gnu == others, path.name
            found += 1
    assert found >= 4
