import json

from tiny_run import make_run
from tiny_run import read_rows

from kdseg.experiment import estimate
from kdseg.experiment import jobs

ARMS = ("patch_unet-none", "patch_unet-mbf", "patch_unet-boom")


def test_lists_the_whole_of_a_new_run_in_order(finished, tmp_path):
  assert jobs.list_jobs(make_run(finished.config, tmp_path / "new")) == [
    jobs.Job(jobs.TEACHER, "teacher_unet"),
    jobs.Job(jobs.STUDENTS, "000", arms=tuple(f"{a}-seed0" for a in ARMS)),
    *(
      jobs.Job(jobs.SCORE, name, 0, "synthetic_test")
      for name in ("teacher_unet", *ARMS)
    ),
  ]
  assert not (tmp_path / "new").exists()


def test_a_run_did_what_was_listed_and_leaves_no_job(finished, tmp_path):
  listed = jobs.list_jobs(make_run(finished.config, tmp_path / "new"))
  lines = (finished.workdir / "log.jsonl").read_text().splitlines()
  logged = [json.loads(line)["stage"] for line in lines]
  trained = [
    job.name if job.kind == jobs.TEACHER else "students"
    for job in listed
    if job.kind != jobs.SCORE
  ]
  assert list(dict.fromkeys(logged)) == [*trained, "run"]
  scored = [(row["arm"], row["dataset"]) for row in read_rows(finished.workdir)]
  assert list(dict.fromkeys(scored)) == [
    (job.name, job.test)
    for job in listed
    # An arm that diverged has no weights to be scored.
    if job.kind == jobs.SCORE and job.name != "patch_unet-boom"
  ]
  assert jobs.list_jobs(make_run(finished.config, finished.workdir)) == []


def test_the_estimate_times_every_kind_of_job():
  kinds = {jobs.ENCODE, jobs.TEACHER, jobs.STUDENTS, jobs.SCORE}
  assert set(estimate._TIMERS) == kinds
