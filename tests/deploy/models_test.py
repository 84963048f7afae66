import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tiny_model

import kdseg
from kdseg import networks
from kdseg.deploy import models
from kdseg.deploy import weights
from kdseg.evaluation import metrics
from kdseg.runtime import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "a.safetensors"
  return models.load(tiny_model.write(path))


def draw(height, width, seed=0):
  return np.random.default_rng(seed).integers(
    0, 256, (height, width, 3), np.uint8
  )


@pytest.mark.parametrize("shape", [(32, 32), (100, 57), (3, 200), (1, 1)])
def test_a_probability_for_every_pixel_of_an_image_of_any_size(model, shape):
  found = model.predict(draw(*shape))
  assert found.shape == shape
  assert found.dtype == np.float32
  assert 0 <= found.min() <= found.max() <= 1


def test_computes_what_the_scores_of_a_run_are_made_of(model):
  image = draw(60, 45)
  square = np.asarray(
    Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
  )
  network = networks.make_network("patch_unet", **tiny_model.OPTIONS)
  logits = network.apply(
    tiny_model.variables(), jnp.asarray(square[None]) / 255.0
  )["logits"]
  expected = metrics.resize_probability(
    np.asarray(jax.nn.sigmoid(logits))[0], 60, 45
  )
  np.testing.assert_allclose(model.predict(image), expected, atol=1e-6)


def test_a_mask_is_what_lies_above_the_threshold(tmp_path):
  path = tiny_model.write(tmp_path / "a.safetensors", threshold=0.3)
  model = models.load(path)
  image = draw(40, 40)
  np.testing.assert_array_equal(
    model.segment(image), model.predict(image) > 0.3
  )


RGB = draw(9, 7)
GREY = np.repeat(RGB[..., :1], 3, axis=2)


@pytest.mark.parametrize(
  ("image", "same"),
  [
    (np.dstack([RGB, np.zeros((9, 7), np.uint8)]), RGB),
    (GREY[..., 0], GREY),
    (GREY[..., :1], GREY),
    (RGB / 255.0, RGB),
    ((RGB / 255.0).astype(np.float32), RGB),
    (np.stack([RGB, GREY]), np.stack([RGB, GREY])),
    (Image.fromarray(RGB), RGB),
    (Image.fromarray(RGB[..., 0]), GREY),
    (Image.fromarray(RGB).convert("RGBA"), RGB),
  ],
  ids=[
    *("rgba", "grey", "grey of one channel", "float64", "float32", "batch"),
    *("PIL", "grey PIL", "RGBA PIL"),
  ],
)
def test_an_image_of_another_kind_is_converted(image, same):
  found = models.to_rgb(image)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, same)


def test_a_path_and_a_picture_are_turned_by_their_tag(model, tmp_path):
  exif = Image.Exif()
  exif[0x112] = 6  # to be turned clockwise by a quarter
  path = tmp_path / "a.png"
  Image.fromarray(RGB).save(path, exif=exif)
  expected = model.predict(np.rot90(RGB, -1))
  for image in (path, str(path), Image.open(path)):
    np.testing.assert_array_equal(model.predict(image), expected)


def test_a_batch_gives_a_probability_for_each_image(model):
  found = model.predict(np.stack([RGB, GREY]))
  np.testing.assert_array_equal(found[0], model.predict(RGB))
  np.testing.assert_array_equal(found[1], model.predict(GREY))


@pytest.mark.parametrize(
  ("image", "said"),
  [
    (np.zeros((3, 8, 9), np.uint8), r"uint8 \[3, 8, 9\]; .*moveaxis"),
    (np.zeros(8, np.uint8), r"but this one is uint8 \[8\]$"),
    (np.zeros((0, 8, 3), np.uint8), r"one pixel, .* uint8 \[0, 8, 3\]"),
    (np.full((8, 8, 3), 255.0), r"float64 \[8, 8, 3\] from 255 to 255; "),
    (np.full((8, 8, 3), np.nan), r"float64 \[8, 8, 3\] from nan"),
    (np.zeros((8, 8), np.uint16), r"uint16 \[8, 8\]; .*/ 65535"),
  ],
)
def test_an_array_that_is_no_image_is_refused(image, said):
  with pytest.raises(ValueError, match=said):
    models.to_rgb(image)


def test_the_package_loads_it_too(tmp_path):
  path = tiny_model.write(tmp_path / "a.safetensors")
  assert kdseg.load(path).name == "a"


def test_it_prints_as_one_line_without_its_weights(model):
  count = networks.count_parameters(model.variables)
  assert repr(model) == (
    f"<Model a: patch_unet, {count:,} parameters, input 32 x 32 pixels, "
    f"threshold 0.5, from {model.source}>"
  )
  assert model.source.name == "a.safetensors"


def test_a_folder_of_a_workdir_is_a_model(tmp_path):
  checkpoint.write_json(
    tmp_path / "config.json",
    {
      "data": {"size": tiny_model.SIZE, "name": "synthetic"},
      "teachers": {},
      "students": {"patch_unet": tiny_model.OPTIONS},
    },
  )
  folder = tmp_path / "arms" / "patch_unet-none-seed2"
  checkpoint.save_variables(
    folder,
    tiny_model.variables(),
    {
      "arm": "patch_unet-none",
      "network": "patch_unet",
      "seed": 2,
      "parameters": 1,
    },
  )
  from_file = models.load(tiny_model.write(tmp_path / "a.safetensors"))
  image = draw(32, 32)
  np.testing.assert_array_equal(
    models.load(folder).predict(image), from_file.predict(image)
  )


def test_a_folder_is_the_one_that_was_named(tmp_path):
  checkpoint.write_json(
    tmp_path / "config.json",
    {
      "data": {"size": tiny_model.SIZE, "name": "synthetic"},
      "teachers": {},
      "students": {"patch_unet": tiny_model.OPTIONS},
    },
  )
  about = {"arm": "x-seedless", "network": "patch_unet", "seed": 0}
  for kind, shift in (("arms", 0.0), ("arms_old", 1.0)):
    variables = jax.tree.map(lambda x, s=shift: x + s, tiny_model.variables())
    checkpoint.save_variables(
      tmp_path / kind / "x-seedless-seed0",
      variables,
      {**about, "parameters": 1},
    )
  for kind, shift in (("arms", 0.0), ("arms_old", 1.0)):
    found = models.load(tmp_path / kind / "x-seedless-seed0").variables
    jax.tree.map(
      lambda x, y, s=shift: np.testing.assert_allclose(x, y + s, rtol=1e-6),
      found,
      tiny_model.variables(),
    )


def test_the_promised_model_is_shipped():
  assert "isic2016-student" in models.shipped()


def test_an_unknown_name_lists_the_shipped_models():
  with pytest.raises(weights.WeightsError, match="no shipped model; shipped: "):
    models.load("isic2016-studnet")


def test_weights_of_another_network_are_named(tmp_path):
  path = tiny_model.write(
    tmp_path / "a.safetensors",
    options={"widths": [4, 4, 6], "depths": [1, 1, 1]},
  )
  with pytest.raises(weights.WeightsError, match=r"a\.safetensors.*encoder"):
    models.load(path)


def test_a_network_that_this_version_does_not_have_is_named(tmp_path):
  path = tiny_model.write(tmp_path / "a.safetensors", network="patch_unit")
  with pytest.raises(weights.WeightsError, match='"patch_unit"; did you mean'):
    models.load(path)


@pytest.mark.parametrize("name", sorted(models.shipped()))
def test_a_shipped_model_is_small_and_finds_a_dark_disc(name):
  path = models.shipped()[name]
  assert path.stat().st_size < 250_000
  assert path.with_suffix(".md").exists()
  y, x = np.mgrid[0:200, 0:300]
  disc = np.hypot(y - 90, x - 160) < 45
  image = np.where(disc[..., None], (110, 70, 60), (225, 180, 160))
  mask = models.load(name).segment(image.astype(np.uint8))
  union = (mask | disc).sum()
  assert (mask & disc).sum() / union > 0.8
