import jax
import pytest

from kdseg.training import settings


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"epochs": 2.0}, 20),
    ({"epochs": 0.25}, 3),
    ({"epochs": 2.0, "max_steps": 7}, 7),
  ],
)
def test_epochs_or_steps(options, expected):
  training = settings.TrainConfig(learning_rate=0.1, **options)
  assert training.steps(examples=80, batch_size=8) == expected


@pytest.mark.parametrize(
  ("backend", "hosts", "wanted", "expected"),
  [
    ("cpu", 1, 0, 1),
    ("tpu", 1, 0, 1),
    ("gpu", 1, 0, 8),
    ("gpu", 2, 0, 1),
    ("gpu", 1, 1, 1),
    ("gpu", 2, 4, 4),
    ("cpu", 1, 3, 3),
  ],
)
def test_the_backend_decides_how_many_seeds_where_nobody_does(
  monkeypatch, backend, hosts, wanted, expected
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "process_count", lambda: hosts)
  assert settings.seeds_at_once(wanted) == expected


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"on_non_finite": "ignore"}, '"stop" or "skip": \'ignore\''),
    ({"warmup": 1.0}, "from 0 to below 1: 1.0"),
  ],
)
def test_a_training_that_would_fail_is_refused_before_it_begins(
  options, message
):
  training = settings.TrainConfig(epochs=1.0, learning_rate=0.1, **options)
  with pytest.raises(ValueError, match=message):
    training.check()
