import hashlib
import html.parser
import io
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import tarfile

import numpy as np
from PIL import Image
import pytest
import tiny_model

from kdseg import predict
from kdseg.data import loading
from kdseg.data.sets import synthetic
from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy import page
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.deploy.page import runtime
from kdseg.deploy.page import site
from kdseg.evaluation import metrics
from kdseg.runtime import checkpoint

BROWSER = pathlib.Path(__file__).resolve().parents[1] / "page_browser"
RUNTIME = {"ort.js": b"export {};", "ort.wasm": b"\0asm"}
NODE = shutil.which("node")
CHROMIUM = next(
  filter(
    None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
  ),
  None,
)


DRAW = site._draw


@pytest.fixture(autouse=True)
def _examples_are_not_drawn(monkeypatch):
  monkeypatch.setattr(site, "_draw", lambda seed: b"a picture")


@pytest.fixture
def exported(tmp_path):
  folder = tmp_path / "exported"
  path = tiny_model.write(folder / "weights.safetensors", arm="tiny <b>")
  checkpoint.write_json(
    folder / "preprocess.json", export.describe_input(models.load_weights(path))
  )
  (folder / "model.onnx").write_bytes(b"32 bits")
  return folder


@pytest.fixture
def built(exported, tmp_path):
  site.build(tmp_path / "page", exported, runtime=RUNTIME)
  return tmp_path / "page"


def names(folder):
  return {
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file()
  }


def described(folder):
  return json.loads((folder / "page.json").read_text(encoding="utf-8"))


class Tags(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.texts = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    tag = self.tags[-1][0] if self.tags else ""
    self.texts.append((tag, data))


# ---------------------------------------------------------------- the folder


def test_writes_the_files_that_it_lists_and_no_others(built):
  said = described(built)
  assert names(built) == {*said["files"], "page.json"}
  parts = [said["runtime"]["file"], said["runtime"]["wasm"]]
  parts += [part["file"] for part in said["networks"] + said["examples"]]
  assert len(parts) == 6
  assert set(parts) <= names(built)
  assert (built / "model.onnx").read_bytes() == b"32 bits"
  assert (said["size"], said["threshold"]) == (tiny_model.SIZE, 0.5)


def test_the_service_worker_keeps_every_other_file_by_its_hash(built):
  worker = (built / "sw.js").read_text()
  listed = dict(json.loads(re.search(r"FILES = (\[.*\]);", worker)[1]))
  assert set(listed) == names(built) - {"sw.js"}
  for name, sha256 in listed.items():
    content = (built / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256


def test_the_same_network_gives_the_same_page(built, exported, tmp_path):
  site.build(tmp_path / "again", exported, runtime=RUNTIME)
  for name in names(built):
    assert (tmp_path / "again" / name).read_bytes() == (
      built / name
    ).read_bytes()


def test_another_network_gives_another_version(built, exported, tmp_path):
  def version(folder):
    return re.search(r'VERSION = "(\w+)"', (folder / "sw.js").read_text())[1]

  (exported / "model.onnx").write_bytes(b"others")
  site.build(tmp_path / "other", exported, runtime=RUNTIME)
  assert version(built) != version(tmp_path / "other")


def test_says_what_the_network_is(built):
  said = described(built)
  about = dict(said["about"])
  model = models.load_weights(built.parent / "exported" / "weights.safetensors")
  assert about["Arm"] == "tiny <b>"
  assert about["Network"] == "patch_unet"
  count = sum(
    leaf.size for leaf in checkpoint.flatten(model.variables["params"]).values()
  )
  assert said["parameters"] == count


def test_weights_are_a_choice_only_where_there_is_one(built, exported):
  assert [n["id"] for n in described(built)["networks"]] == ["fp32"]
  (exported / "model.int8.onnx").write_bytes(b"8 bits")
  site.build(built, exported, runtime=RUNTIME)
  assert [n["id"] for n in described(built)["networks"]] == ["fp32", "int8"]
  assert (built / "model.int8.onnx").read_bytes() == b"8 bits"
  # And back: what the page no longer has does not stay.
  (exported / "model.int8.onnx").unlink()
  site.build(built, exported, runtime=RUNTIME)
  assert "model.int8.onnx" not in names(built)


def test_takes_the_int8_file_that_it_is_given(
  built, exported, tmp_path, monkeypatch
):
  path = tmp_path / "small.onnx"
  path.write_bytes(b"given")
  with pytest.raises(weights.WeightsError, match=r"small\.onnx cannot be open"):
    site.build(built, exported, runtime=RUNTIME, int8=path)
  monkeypatch.setattr(models, "load_exported", lambda *file: None)
  site.build(built, exported, runtime=RUNTIME, int8=path)
  assert (built / "model.int8.onnx").read_bytes() == b"given"


def test_an_example_is_a_small_picture(monkeypatch):
  def draw(rng, size):
    return rng.integers(0, 99, (size, size, 3), np.uint8), None

  monkeypatch.setattr(site.synthetic, "draw", draw)
  content = DRAW(-1 + 2**31)
  with Image.open(io.BytesIO(content)) as image:
    assert (image.size, image.format) == ((640, 480), "JPEG")


# ------------------------------------------------------------ what may happen


def test_a_folder_with_something_else_is_refused_and_left(exported, tmp_path):
  out = tmp_path / "home"
  out.mkdir()
  (out / "letter.txt").write_text("mine")
  with pytest.raises(runtime.PageError, match=r"not empty.*--force"):
    site.build(out, exported, runtime=RUNTIME)
  assert names(out) == {"letter.txt"}
  site.build(out, exported, runtime=RUNTIME, force=True)
  assert (out / "letter.txt").read_text() == "mine"
  assert (out / "index.html").exists()


def test_an_earlier_page_is_replaced_and_what_is_beside_it_stays(
  built, exported
):
  (built / "CNAME").write_text("example.org")
  (exported / "model.onnx").write_bytes(b"others")
  site.build(built, exported, runtime=RUNTIME)
  assert (built / "model.onnx").read_bytes() == b"others"
  assert (built / "CNAME").exists()


def test_an_earlier_page_removes_nothing_outside(built, exported, tmp_path):
  (tmp_path / "outside").write_text("mine")
  said = described(built)
  said["files"] += ["../outside", "gone.js"]
  (built / "gone.js").write_text("")
  (built / "page.json").write_text(json.dumps(said))
  site.build(built, exported, runtime=RUNTIME)
  assert (tmp_path / "outside").exists()
  assert not (built / "gone.js").exists()


def test_an_empty_folder_is_as_good_as_none(exported, tmp_path):
  (tmp_path / "page").mkdir()
  site.build(tmp_path / "page", exported, runtime=RUNTIME)
  assert (tmp_path / "page" / "sw.js").exists()


def test_a_file_is_no_folder(exported, tmp_path):
  (tmp_path / "page").write_text("")
  with pytest.raises(runtime.PageError, match="is a file"):
    site.build(tmp_path / "page", exported, runtime=RUNTIME, force=True)


def test_a_page_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
  write = pathlib.Path.write_bytes

  def full(path, data):
    if path.name == "style.css":
      raise OSError("No space left on device")
    return write(path, data)

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(OSError, match="No space"):
    site.build(tmp_path / "page", exported, runtime=RUNTIME)
  assert sorted(tmp_path.iterdir()) == before


def test_a_page_can_be_read_by_a_web_server(built):
  others = stat.S_IROTH | stat.S_IXOTH
  mask = os.umask(0)
  os.umask(mask)
  assert built.stat().st_mode & others == others & ~mask


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("model.onnx", r"has no model\.onnx; write it with"),
    ("preprocess.json", r"preprocess\.json cannot be read"),
  ],
)
def test_an_export_that_is_not_whole_is_named(exported, tmp_path, name, said):
  (exported / name).unlink()
  with pytest.raises(runtime.PageError, match=said):
    site.build(tmp_path / "page", exported, runtime=RUNTIME)
  assert not (tmp_path / "page").exists()


def test_an_export_of_another_version_is_named(exported, tmp_path):
  (exported / "preprocess.json").write_text('{"size": 32}')
  with pytest.raises(runtime.PageError, match=r"'input'.*export again"):
    site.build(tmp_path / "page", exported, runtime=RUNTIME)


def test_an_export_without_weights_is_enough(exported, tmp_path):
  (exported / "weights.safetensors").unlink()
  said = site.build(tmp_path / "page", exported, runtime=RUNTIME)
  assert said["about"] == []


# ----------------------------------------------------------------- the runtime


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A package with two files, as npm would fetch it, and an empty cache."""
  path = tmp_path / "runtime.tgz"
  with tarfile.open(path, "w:gz") as file:
    for name, content in RUNTIME.items():
      member = tarfile.TarInfo(f"package/dist/{name}")
      member.size = len(content)
      file.addfile(member, io.BytesIO(content))
  digest = runtime.base64.b64encode(hashlib.sha512(path.read_bytes()).digest())
  monkeypatch.setattr(runtime, "RUNTIME_INTEGRITY", f"sha512-{digest.decode()}")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  return path


FILES = {
  name: (f"dist/{name}", hashlib.sha256(content).hexdigest())
  for name, content in RUNTIME.items()
}


def install_npm(tmp_path, script):
  npm = tmp_path / "bin" / "npm"
  npm.parent.mkdir(exist_ok=True)
  npm.write_text(f"#!/bin/sh\n{script}\n")
  npm.chmod(0o755)


def packing(package):
  # $5: behind pack, the package, --silent and --pack-destination.
  return f'/bin/cp {package} "$5/{package.name}"'


def test_the_runtime_is_fetched_once(package, tmp_path):
  install_npm(tmp_path, packing(package))
  assert runtime.get_runtime(files=FILES) == RUNTIME
  (tmp_path / "bin" / "npm").unlink()
  assert runtime.get_runtime(files=FILES) == RUNTIME


def test_a_damaged_cache_is_fetched_again(package, tmp_path):
  install_npm(tmp_path, packing(package))
  runtime.get_runtime(files=FILES)
  [kept] = (tmp_path / "cache").rglob("ort.js")
  kept.write_bytes(b"evil")
  assert runtime.get_runtime(files=FILES) == RUNTIME
  assert kept.read_bytes() == RUNTIME["ort.js"]


def test_a_cache_that_cannot_be_written_costs_a_download(
  package, tmp_path, capsys
):
  install_npm(tmp_path, packing(package))
  (tmp_path / "cache").write_text("a file")
  assert runtime.get_runtime(files=FILES) == RUNTIME
  assert "cannot be written" in capsys.readouterr().err


def test_without_npm_it_says_what_to_do(package):
  with pytest.raises(runtime.PageError, match=r"npm pack .* --runtime"):
    runtime.get_runtime(files=FILES)
  assert runtime.get_runtime(package, files=FILES) == RUNTIME


def test_without_a_network_it_says_what_npm_said(package, tmp_path):
  install_npm(tmp_path, "echo 'npm error code ENOTFOUND' >&2; exit 1")
  with pytest.raises(runtime.PageError, match=r"ENOTFOUND.*with a network"):
    runtime.get_runtime(files=FILES)


def test_another_package_than_the_published_one_is_not_used(package):
  package.write_bytes(package.read_bytes() + b"\0")
  with pytest.raises(runtime.PageError, match="not used"):
    runtime.get_runtime(package, files=FILES)
  with pytest.raises(runtime.PageError, match="cannot be read"):
    runtime.get_runtime(package.parent / "absent.tgz", files=FILES)


def test_another_file_than_the_published_one_is_not_used(package):
  files = FILES | {"ort.js": ("dist/ort.js", "0" * 64)}
  with pytest.raises(runtime.PageError, match="another SHA-256"):
    runtime.get_runtime(package, files=files)


# ----------------------------------------------------------------- the command


def test_the_command_writes_a_page_of_an_export(
  exported, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(runtime, "get_runtime", lambda archive: RUNTIME)
  out = tmp_path / "page"
  assert page.main([str(out), "--model", str(exported)]) == 0
  assert "http.server" in capsys.readouterr().out
  assert (out / "index.html").exists()


def test_the_command_exports_a_model_first(tmp_path, monkeypatch):
  monkeypatch.setattr(runtime, "get_runtime", lambda archive: RUNTIME)
  path = tiny_model.write(tmp_path / "a.safetensors")
  out = tmp_path / "page"
  assert page.main([str(out), "--model", str(path)]) == 0
  assert (out / "model.onnx").stat().st_size > 1000


def test_the_command_says_in_one_line_what_is_wrong(
  exported, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(runtime, "get_runtime", lambda archive: RUNTIME)
  out = tmp_path / "page"
  for model, said in (
    ("nothing", "kdseg: nothing is no file"),
    (str(tmp_path), f"kdseg: {tmp_path} has no model.onnx"),
  ):
    assert page.main([str(out), "--model", model]) == 1
    assert capsys.readouterr().err.startswith(said)
  # Before anything is fetched.
  monkeypatch.delattr(runtime, "get_runtime")
  assert page.main([str(tmp_path), "--model", str(exported)]) == 1
  assert "not empty" in capsys.readouterr().err


# ---------------------------------------------------------------------- privacy


def test_the_page_can_reach_nothing_but_its_own_server(built):
  tags = Tags((built / "index.html").read_text()).tags
  [policy] = [
    attributes["content"]
    for tag, attributes in tags
    if attributes.get("http-equiv") == "Content-Security-Policy"
  ]
  rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
  assert rules.pop("default-src") == "'none'"
  assert rules.pop("script-src") == "'self' 'wasm-unsafe-eval'"
  assert rules.pop("img-src") == "'self' blob:"
  assert set(rules.values()) == {"'self'", "'none'"}
  # It stands before all that it has to govern.
  kinds = [tag for tag, _ in tags]
  assert kinds.index("link") > 3
  assert "http-equiv" in tags[3][1]


def test_the_page_holds_no_script_and_no_style_of_its_own(built):
  read = Tags((built / "index.html").read_text())
  assert not [t for tag, t in read.texts if tag == "script" and t.strip()]
  for tag, attributes in read.tags:
    assert tag != "style"
    assert "style" not in attributes
    assert not [key for key in attributes if key.startswith("on")]


def test_no_file_names_another_server(built):
  for path in built.glob("*"):
    if path.suffix in {".css", ".html", ".js"}:
      found = re.findall(r"https?://[\w.]+", path.read_text(encoding="utf-8"))
      assert set(found) <= {"http://localhost"}, path


def test_every_control_has_a_name_and_every_reference_its_target(built):
  text = (built / "index.html").read_text()
  tags = Tags(text).tags
  ids = [a["id"] for _, a in tags if "id" in a]
  assert len(ids) == len(set(ids))
  for _, attributes in tags:
    for key in ("for", "aria-labelledby", "aria-describedby"):
      assert attributes.get(key, ids[0]) in ids
  for name in re.findall(r'\$\("([\w-]+)"\)', (built / "app.js").read_text()):
    assert name in ids
  assert "not a medical device" in text


# ------------------------------------------------------------------- arithmetic


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
  """Runs cases through the page's own files, in Node."""
  if NODE is None:
    pytest.skip("node is not installed")
  folder = tmp_path_factory.mktemp("js")
  for path in pathlib.Path(page.__file__).with_name("files").glob("*.js"):
    shutil.copy(path, folder)
  (folder / "package.json").write_text('{"type": "module"}')

  def run(cases):
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
      [NODE, BROWSER / "arithmetic.mjs", folder / "cases.json", folder],
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  return run


def test_images_are_resized_to_the_bit_as_in_python(arithmetic):
  rng = np.random.default_rng(0)
  shapes = [(48, 64), (37, 91), (9, 7), (32, 50), (50, 32), (32, 32), (1, 1)]
  images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in shapes]
  images.append(np.full((40, 40, 3), 255, np.uint8))
  cases = [
    {
      "kind": "image",
      "width": image.shape[1],
      "height": image.shape[0],
      "size": 32,
      "rgba": np.pad(image, [(0, 0), (0, 0), (0, 1)]).ravel().tolist(),
    }
    for image in images
  ]
  for image, resized in zip(images, arithmetic(cases)):
    np.testing.assert_array_equal(
      np.reshape(resized, (32, 32, 3)),
      loading.resize_image(image, 32),
      str(image.shape),
    )


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.9999])
def test_a_probability_is_resized_and_measured_as_in_python(
  arithmetic, threshold
):
  rng = np.random.default_rng(1)
  map_ = rng.random((32, 32), np.float32)
  cases = [
    {
      "kind": "map",
      "width": width,
      "height": height,
      "size": 32,
      "threshold": threshold,
      "map": map_.ravel().tolist(),
    }
    for height, width in ((100, 75), (32, 32), (10, 50), (32, 40), (1, 1))
  ]
  for case, said in zip(cases, arithmetic(cases)):
    expected = metrics.resize_probability(map_, case["height"], case["width"])
    resized = np.reshape(np.float32(said["resized"]), expected.shape)
    np.testing.assert_allclose(resized, expected, atol=1e-6)
    mask = resized > np.float32(threshold)
    assert said["share"] == pytest.approx(mask.mean())
    assert said["confidence"] == pytest.approx(
      predict.confidence(resized, mask), abs=1e-6
    )


def test_the_outline_goes_around_the_mask(arithmetic):
  y, x = np.mgrid[:32, :32] + 0.5
  ring = 12 - np.hypot(x - 16, y - 16)
  maps = {
    "disc": ring,
    "hole": np.minimum(ring, np.hypot(x - 16, y - 16) - 5),
    "corner": 20 - np.hypot(x, y),
    "all": np.ones((32, 32)),
    "none": -np.ones((32, 32)),
    "noise": np.random.default_rng(2).normal(size=(32, 32)),
  }
  maps = {
    name: np.float32(1 / (1 + np.exp(-map_))) for name, map_ in maps.items()
  }
  cases = [
    {
      "kind": "map",
      "width": 160,
      "height": 160,
      "size": 32,
      "threshold": 0.5,
      "map": map_.ravel().tolist(),
    }
    for map_ in maps.values()
  ]
  found = dict(zip(maps, arithmetic(cases)))
  counts = {name: len(said["lines"]) for name, said in found.items()}
  noise = counts.pop("noise")
  assert counts == {"disc": 1, "hole": 2, "corner": 1, "all": 1, "none": 0}
  assert noise > 20
  for name, said in found.items():
    area = 0.0
    for line in said["lines"]:
      u, v = np.array(line).T
      assert u.min() >= 0
      assert u.max() <= 1
      # Signed by the way round: a hole takes away.
      area += np.sum(u * np.roll(v, -1) - v * np.roll(u, -1)) / 2
    assert abs(area) == pytest.approx(said["share"], abs=0.01), name


# --------------------------------------------------------------------- browser


def _missing():
  if NODE is None:
    return "node is not installed"
  if CHROMIUM is None:
    return "chromium is not installed (Debian: apt-get install chromium)"
  found = subprocess.run(
    [NODE, "-e", "require('playwright-core')"], capture_output=True, check=False
  )
  if found.returncode:
    return (
      "node finds no playwright-core: npm install --prefix DIR "
      "playwright-core and set NODE_PATH=DIR/node_modules"
    )
  return None


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
  """One long visit of a real browser to a page of the shipped network."""
  if reason := _missing():
    pytest.skip(reason)
  try:
    fetched = runtime.get_runtime()
  except runtime.PageError as error:
    pytest.skip(str(error))
  folder = tmp_path_factory.mktemp("visit")
  model = models.load_weights("isic2016-student")
  exported = folder / "exported"
  export.export(model, exported, formats=[site.ONNX])
  site.build(folder / "page", exported, runtime=fetched)
  preprocess = exported / "preprocess.json"
  said = json.loads(preprocess.read_text())
  preprocess.write_text(json.dumps(said | {"threshold": 0.4}))
  site.build(folder / "newer", exported, runtime=fetched)

  picture = Image.fromarray(synthetic.draw(np.random.default_rng(7), 600)[0])
  exif = Image.Exif()
  exif[0x112] = 6  # a camera held upright
  files = {
    name: folder / name
    for name in ("turned.jpg", "large.png", "grey.png", "notes.jpg")
  }
  picture.crop((0, 100, 600, 500)).save(
    files["turned.jpg"], quality=92, exif=exif
  )
  picture.resize((2700, 2000)).save(files["large.png"], compress_level=1)
  picture.convert("L").resize((90, 70)).save(files["grey.png"])
  files["notes.jpg"].write_text("not an image")
  work = {
    "page": folder / "page",
    "newer": folder / "newer",
    "newerThreshold": "0.4",
    "chromium": CHROMIUM,
    "profile": folder / "profile",
    "out": folder,
    "files": files,
  }
  (folder / "work.json").write_text(json.dumps(work, default=str))
  done = subprocess.run(
    [NODE, BROWSER / "drive.cjs", folder / "work.json"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  seen = json.loads((folder / "seen.json").read_text())
  examples = described(folder / "page")["examples"]
  images = {
    f"example-{i}": folder / "page" / example["file"]
    for i, example in enumerate(examples)
  }
  images |= {name: files[name] for name in ("turned.jpg", "large.png")}
  images |= {"grey.png": files["grey.png"], "offline": images["example-2"]}
  images |= {"dropped": images["example-1"]}
  return seen, folder, model, images


@pytest.mark.slow
def test_a_browser_loads_it_without_a_complaint(visit):
  assert visit[0]["console"] == []
  assert not visit[0]["loading"]


@pytest.mark.slow
def test_a_browser_asks_its_own_server_alone_and_only_for_files(visit):
  for method, url in visit[0]["requests"]:
    assert method == "GET"
    assert url.startswith((visit[0]["origin"] + "/", "blob:"))
    assert "?" not in url
  assert visit[0]["outside"] == "connect-src"


@pytest.mark.slow
def test_a_browser_finds_the_mask_that_python_finds(visit):
  seen, folder, model, images = visit
  for name, path in images.items():
    said = seen["files"][name]
    size = said["height"], said["width"]
    found = np.fromfile(folder / f"{name}.f32", np.float32).reshape(size)
    image = pictures.read(path)
    expected = model.predict(image)
    if expected.size > 4_194_304:
      expected = metrics.resize_probability(expected, *size)
    assert expected.shape == found.shape, name
    one, two = expected > 0.5, found > 0.5
    assert one.any()
    assert (one & two).sum() / (one | two).sum() >= 0.99, name
    # No decoder of JPEG is between these.
    if name == "grey.png":
      np.testing.assert_allclose(found, expected, atol=1e-4)
    assert said["share"] == pytest.approx(two.mean())
    assert said["area"] == f"{100 * two.mean():.1f} %"
    assert said["confidence"] == pytest.approx(predict.confidence(found, two))
    assert said["area"] in said["status"]
    assert said["area"] in said["label"]


@pytest.mark.slow
def test_a_browser_names_a_file_that_is_not_an_image(visit):
  said = visit[0]["files"]["notes.jpg"]["problem"]
  assert said.startswith("notes.jpg is not an image that this browser can read")


@pytest.mark.slow
def test_a_browser_shows_nothing_of_another_image_beside_an_error(visit):
  assert "grey.png" in visit[0]["files"]  # was shown before
  left = visit[0]["files"]["notes.jpg"]
  assert left["numbers"] == [*3 * ["\N{EN DASH}"], "", ""]
  assert not left["picture"]
  assert not left["save"]
  assert not left["pressed"]


@pytest.mark.slow
def test_the_keyboard_reaches_and_moves_everything(visit):
  seen = visit[0]
  reached = {at["name"] for at in seen["focus"]}
  assert {"theme", "choose", "camera", "threshold", "outline", "save"} < reached
  assert set(seen["examples"]) < reached
  assert all(at["ring"] for at in seen["focus"])
  highest, lower = seen["files"]["highest"], seen["files"]["int8"]
  assert highest["threshold"] == 0.99
  assert lower["threshold"] == 0.5
  assert highest["share"] < lower["share"]
  assert lower["precision"] == "int8"
  assert lower["share"] != seen["files"]["example-0"]["share"]
  assert seen["outline"] is False


@pytest.mark.slow
def test_the_overlay_is_saved_with_its_outline(visit):
  seen, folder, _, images = visit
  assert seen["download"].endswith("-outline.png")
  with Image.open(folder / "overlay.png") as overlay:
    drawn = np.asarray(overlay.convert("RGB")).astype(int)
  image = pictures.read(images["example-0"])
  assert drawn.shape == image.shape
  yellow = (np.abs(drawn - (255, 214, 0)) < 20).all(2)
  assert 300 < yellow.sum() < 20_000


@pytest.mark.slow
def test_it_fits_a_phone_and_changes_its_theme_and_has_a_camera(visit):
  seen = visit[0]
  assert seen["overflow"] <= 0
  assert seen["theme"] == "dark"
  assert seen["camera"].startswith("Camera picture: ")


@pytest.mark.slow
def test_it_works_offline_and_takes_a_newer_version(visit):
  assert visit[0]["files"]["offline"]["share"] > 0
  assert visit[0]["renewed"]
