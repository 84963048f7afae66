"""Tables: what they show, and that no name can break out of a cell."""

import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest

from kdseg.evaluation import metrics
from kdseg.report import __main__ as command
from kdseg.report import scores
from kdseg.report import tables

NONE, M2BF = "patch_unet_50k-none", "patch_unet_50k-m2bf"
TEACHER = "teacher-unetpp"
META = {
  "train": {"name": "isic2016_train", "found": 751, "official": 900},
  "arms": {NONE: {"parameters": 49532, "macs": 3.1e7}},
  "bootstrap": {"resamples": 200},
}
NASTY = (
  "=1+1|x",
  "+1|x",
  "-1|x",
  "@me|x",
  "a|b\\|c",
  "<script>alert(1)</script>",
  "<img src=x onerror=alert(1)>",
  "a&lt;b",
  "[link](http://example.com)",
  "![picture](http://example.com/x.png)",
  "http://example.com",
  "www.example.com",
  "`code`",
  "*bold* _italic_ ~~gone~~ $x$",
  "two\nlines",
  "# heading",
  r"\input{/etc/passwd} 50% & $ # _ { } ~ ^",
)


def make_rows(arm, mean, *, seeds=2, dataset="ph2", images=12):
  own = np.random.default_rng(sum(map(ord, arm)))
  rows = []
  for seed in range(seeds):
    for i in range(images):
      dice = mean + 0.01 * own.normal()
      row = dict.fromkeys(metrics.COLUMNS, dice)
      row |= dict.fromkeys((*metrics.Counts._fields, "height", "width"), 100)
      row |= {"hd95": 12.345, "empty_prediction": int(i == 0)}
      rows.append(
        {"arm": arm, "seed": seed, "dataset": dataset, "id": f"{i}", **row}
      )
  return rows


@pytest.fixture
def rows():
  return [
    *make_rows(TEACHER, 0.9, seeds=1),
    *make_rows(NONE, 0.85),
    *make_rows(M2BF, 0.87),
  ]


def markdown_tables(text):
  """Splits into tables of cells, the way GitHub does."""
  found, table = [], []
  for line in [*text.split("\n"), ""]:
    if line.startswith("|"):
      cells = re.split(r"(?<!\\)\|", line)
      table.append([cell.strip() for cell in cells[1:-1]])
    elif table:
      found.append(table)
      table = []
  return found


class TestMarkdown:
  def test_shows_mean_and_deviation_of_the_seeds(self, rows):
    text = tables.make_tables(rows, META)["table.md"]
    by_seed = [
      np.mean([r["dice"] for r in rows if r["arm"] == NONE and r["seed"] == s])
      for s in (0, 1)
    ]
    header, _, _, row, _ = markdown_tables(text)[0]
    got = dict(zip(header, row))
    assert got["Dice"] == (
      f"{np.mean(by_seed):.4f} ± {np.std(by_seed, ddof=1):.4f}"
    )
    assert got["HD95, px"] == "12.35 ± 0.00"
    assert got["empty predictions"] == "2 of 24"
    assert got["parameters"] == "49,532"
    assert got["MACs"] == "31.0 M"
    # Every seed is printed beneath.
    assert f"{by_seed[0]:.4f} (seed 0), {by_seed[1]:.4f} (seed 1)" in text

  def test_one_seed_has_no_deviation_beside_it(self, rows):
    text = tables.make_tables(rows, META)["table.md"]
    teacher = markdown_tables(text)[0][2]
    assert teacher[0] == TEACHER
    assert "±" not in " ".join(teacher)

  def test_pooled_scores_stand_beside_the_means(self, rows):
    text = tables.make_tables(rows, META)["table.md"]
    header, _, row, *_ = markdown_tables(text)[0]
    got = dict(zip(header, row))
    # 100 pixels in each of the four counts: 200 / 400 and 100 / 300.
    assert got["Dice, pooled"] == "0.5000"
    assert got["Jaccard, pooled"] == "0.3333"

  def test_the_protocol_of_each_data_set_stands_once_at_the_head(self, rows):
    more = make_rows(NONE, 0.8, dataset="isic2016_test")
    text = tables.make_tables(rows + more, META)["table.md"]
    head = text.partition("\n## ")[0]
    for name in ("ph2", "isic2016_test"):
      assert head.count(f"Protocol: {name}, n = 12") == 1
    assert "751 of 900 (a subset)" in head
    assert "lesion where p > " in head
    assert text.count("Protocol:") == 2

  def test_the_difference_has_intervals_and_a_verdict(self, rows):
    text = tables.make_tables(rows, META)["table.md"]
    header, _, row = markdown_tables(text)[1]
    got = dict(zip(header, row))
    assert (got["arm"], got["against"]) == (M2BF, NONE)
    assert re.fullmatch(r"\+0\.0\d{3}", got["difference"])
    ends = r"\[[+-]0\.\d{4}, [+-]0\.\d{4}\]"
    assert re.fullmatch(ends, got["95 %, bootstrap"])
    assert re.fullmatch(ends, got["95 %, random effects"])
    assert got["in words"] in text

  def test_small_p_values_are_not_printed_as_zero(self):
    few = make_rows(NONE, 0.8, images=40) + make_rows(M2BF, 0.9, images=40)
    text = tables.make_tables(few, META)["table.md"]
    header, _, row = markdown_tables(text)[1]
    assert dict(zip(header, row))["Wilcoxon p"] == "< 0.0001"

  def test_warnings_come_first(self):
    text = tables.make_tables(make_rows(M2BF, 0.8), META)["table.md"]
    assert text.index("> **Warning.**") < text.index("## ph2")

  def test_the_gate_is_printed(self, rows):
    text = tables.make_tables(rows, META)["table.md"]
    assert "Gate: teacher-unetpp minus patch_unet_50k-none" in text

  def test_notes_come_last(self, rows):
    text = tables.make_tables(rows, {**META, "notes": ["seen"]})["table.md"]
    assert text.rstrip().endswith("* seen")

  def test_is_the_same_each_time(self, rows):
    assert tables.make_tables(rows, META) == tables.make_tables(rows, META)

  def test_underscores_of_arms_stay_readable(self, rows):
    assert f"| {NONE} |" in tables.make_tables(rows, META)["table.md"]


class TestMissingMetric:
  """Rows of a scores.csv that is older than NSD and accuracy."""

  @pytest.fixture
  def texts(self, rows):
    for row in rows:
      if row["arm"] == M2BF and row["seed"] == 1:
        del row["nsd"], row["accuracy"]
    return tables.make_tables(rows, META)

  def test_shows_as_missing_and_never_as_a_mean_of_the_others(self, texts):
    found = markdown_tables(texts["table.md"])
    main, difference, others = found[0], found[2], found[3]
    nsd = [dict(zip(main[0], row))["NSD at 2 px"] for row in main[2:]]
    assert nsd[2] == "-"
    assert "-" not in nsd[:2]
    assert dict(zip(difference[0], difference[2]))["NSD at 2 px"] == "-"
    assert dict(zip(others[0], others[4]))["accuracy"] == "-"

  def test_is_blank_in_csv(self, texts):
    *_, none, m2bf = csv.DictReader(io.StringIO(texts["table.csv"]))
    for name in ("nsd", "nsd_seed_sd", "nsd_difference", "nsd_low", "accuracy"):
      assert m2bf[name] == ""
    assert none["nsd"] != ""

  def test_leaves_the_other_metrics_as_they_were(self, texts):
    rows = [
      *make_rows(TEACHER, 0.9, seeds=1),
      *make_rows(NONE, 0.85),
      *make_rows(M2BF, 0.87),
    ]
    whole = tables.make_tables(rows, META)["table.csv"]
    for row, want in zip(
      *(csv.DictReader(io.StringIO(t)) for t in (texts["table.csv"], whole))
    ):
      kept = {k: v for k, v in row.items() if k in want and row[k] != ""}
      assert {k: want[k] for k in kept} == kept


@pytest.fixture(scope="module", params=NASTY)
def texts(request):
  """Tables of arms, a data set, a group and a note called like this."""
  name = request.param
  student = name.lstrip("-")  # what comes before the first hyphen
  rows = make_rows(f"{student}-none", 0.8)
  rows += make_rows(f"{student}-m2bf", 0.9)
  for row in rows:
    row["dataset"] = name
  meta = {**META, "notes": [name], "groups": {name: ["1"]}}
  return tables.make_tables(rows, meta)


class TestNames:
  def test_no_name_adds_a_cell_or_a_line_to_markdown(self, texts):
    found = markdown_tables(texts["table.md"])
    assert len(found) == 5
    assert [len(table) for table in found] == [4, 3, 3, 4, 4]
    for table in found:
      assert len({len(row) for row in table}) == 1

  def test_no_name_becomes_html(self, texts):
    tags = []

    class Parser(html.parser.HTMLParser):
      def handle_starttag(self, tag, attrs):
        del attrs
        tags.append(tag)

    text = texts["table.md"].replace("> **Warning", "")
    Parser().feed(text)
    assert tags == []
    assert not re.search(r"<(?!\s)", text)

  def test_no_name_becomes_a_link(self, texts):
    text = texts["table.md"]
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "://" not in text
    assert "www." not in text
    assert "@" not in text

  def test_no_cell_of_markdown_starts_a_formula(self, texts):
    for table in markdown_tables(texts["table.md"]):
      for row in (table[0], *table[2:]):
        for cell in row:
          if cell[0] in "=+-@" and cell != "-":
            assert re.match(r"[+-][\d.]+($| \[)", cell)

  def test_no_cell_of_csv_starts_a_formula(self, texts):
    for row in csv.reader(io.StringIO(texts["table.csv"])):
      for cell in row:
        if cell[:1] in ("=", "+", "-", "@"):
          float(cell)

  def test_no_name_is_a_command_of_latex(self, texts):
    text = texts["table.tex"]
    body = "\n".join(line for line in text.split("\n") if line[:1] != "%")
    assert r"\input" not in body
    # Every special character is escaped, or is ours.
    ours = re.sub(r"\\[&%$#_{}]", "", body)
    for line in ours.split("\n"):
      assert "%" not in line or line == r"\resizebox{\linewidth}{!}{%"
    assert not re.search(r"[#^~_]", ours)
    assert ours.count("{") == ours.count("}")
    assert ours.replace(r"$\pm$", "").count("$") == 0

  def test_no_name_adds_a_cell_to_latex(self, texts):
    text = texts["table.tex"]
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.DOTALL):
      lines = [line for line in block.strip().split("\n") if "rule" not in line]
      cells = {len(re.split(r"(?<!\\)&", line)) for line in lines}
      assert len(cells) == 1
      assert all(line.endswith(r"\\") for line in lines)

  def test_no_name_leaves_a_comment_of_latex(self, texts):
    for line in texts["table.tex"].split("\n"):
      assert not line.startswith(("lines", "% two"))


class TestLatex:
  # Of the LaTeX kernel and the class article.
  KERNEL = frozenset(
    (
      *("begin", "end", "caption", "centering", "linewidth", "pm", "par"),
      *("raggedright", "scriptsize", "smallskip", "textasciicircum", "textbar"),
      *("textasciitilde", "textbackslash", "textgreater", "textless"),
    )
  )
  PACKAGES = {  # noqa: RUF012
    "toprule": "{booktabs}",
    "midrule": "{booktabs}",
    "bottomrule": "{booktabs}",
    "resizebox": "{graphicx}",
    "textquotedbl": "[T1]{fontenc}",
  }

  def test_its_head_names_the_package_of_every_command(self, texts):
    head, _, body = texts["table.tex"].partition("\n")
    body = re.sub(r"(?m)^%.*", "", body).replace(r"\\", "")
    for name in set(re.findall(r"\\([A-Za-z]+)", body)) - self.KERNEL:
      assert rf"\usepackage{self.PACKAGES[name]}" in head

  def test_the_protocol_stands_once_for_each_data_set(self, rows):
    more = make_rows(NONE, 0.8, dataset="isic2016_test")
    text = tables.make_tables(rows + more, META)["table.tex"]
    for name in ("ph2", r"isic2016\_test"):
      assert text.count(f"Protocol: {name}, n = 12") == 1


class TestCsv:
  def test_holds_the_numbers_unrounded(self, rows):
    text = tables.make_tables(rows, META)["table.csv"]
    teacher, none, m2bf = csv.DictReader(io.StringIO(text))
    want = np.mean([r["dice"] for r in rows if r["arm"] == M2BF])
    assert float(m2bf["dice"]) == pytest.approx(want, abs=1e-12)
    assert (m2bf["seeds"], m2bf["images"]) == ("0 1", "12")
    assert m2bf["baseline"] == NONE
    gain = float(m2bf["dice"]) - float(none["dice"])
    assert float(m2bf["dice_difference"]) == pytest.approx(gain)
    low, high = float(m2bf["dice_low"]), float(m2bf["dice_high"])
    assert low < gain < high
    assert none["dice_difference"] == ""
    assert none["parameters"] == "49532"
    assert teacher["dice_seed_sd"] == ""
    assert teacher["empty_predictions"] == "1"

  def test_holds_every_comparison_of_an_arm(self, rows):
    entry = {"dataset": "ph2", "arm": M2BF, "against": "x-kd"}
    kd = [row | {"arm": "x-kd"} for row in rows if row["arm"] == NONE]
    meta = {**META, "primary": [entry]}
    text = tables.make_tables([*rows, *kd], meta)["table.csv"]
    found = [
      (row["arm"], row["baseline"], row["holm_p"] != "")
      for row in csv.DictReader(io.StringIO(text))
      if row["arm"] == M2BF
    ]
    assert found == [(M2BF, NONE, False), (M2BF, "x-kd", True)]

  def test_every_row_has_every_column(self, rows):
    text = tables.make_tables(rows, META)["table.csv"]
    lengths = {len(row) for row in csv.reader(io.StringIO(text))}
    assert len(lengths) == 1


class TestCommand:
  @pytest.fixture
  def workdir(self, tmp_path, rows):
    folder = tmp_path / "run"
    folder.mkdir()
    scores.write(folder / "scores.csv", rows)
    (folder / "report.json").write_text(json.dumps(META))
    return folder

  def test_rebuilds_the_tables_of_one_folder(self, workdir, rows, capsys):
    assert command.main([str(workdir)]) == 0
    for name, text in tables.make_tables(rows, META).items():
      assert (workdir / name).read_text("utf-8") == text
      assert name in capsys.readouterr().out or name != "table.md"

  def test_merges_several_folders(self, workdir, tmp_path, rows):
    other = tmp_path / "other"
    other.mkdir()
    more = make_rows("patch_unet_50k-mbf", 0.86)
    scores.write(other / "scores.csv", rows[:12] + more)  # the same teacher
    (other / "report.json").write_text(json.dumps(META))
    out = tmp_path / "new" / "out"
    got = command.main([str(workdir), str(other), "--out", str(out)])
    assert got == 0
    assert (out / "table.md").read_text("utf-8") == (
      tables.make_tables(rows + more, META)["table.md"]
    )

  def test_leaves_out_images_and_says_how_many_are_left(
    self, workdir, tmp_path, rows
  ):
    meta = {**META, "datasets": {"ph2": {"found": 12, "official": 12}}}
    (workdir / "report.json").write_text(json.dumps(meta))
    out = tmp_path / "out"
    args = [str(workdir), "--without", "3", "5", "--out", str(out)]
    assert command.main(args) == 0
    kept = [row for row in rows if row["id"] not in ("3", "5")]
    text = (out / "table.md").read_text("utf-8")
    assert text == tables.make_tables(kept, meta)["table.md"]
    assert "n = 10 of 12" in text

  def test_refuses_to_leave_out_in_place_or_what_is_not_there(
    self, workdir, tmp_path, capsys
  ):
    with pytest.raises(SystemExit):
      command.main([str(workdir), "--without", "3"])
    assert "--out" in capsys.readouterr().err
    args = [str(workdir), "--without", "3", "x", "--out", str(tmp_path / "out")]
    assert command.main(args) == 1
    assert "no image is called x" in capsys.readouterr().err

  def test_several_folders_need_a_place(self, workdir, capsys):
    with pytest.raises(SystemExit):
      command.main([str(workdir), str(workdir)])
    assert "--out" in capsys.readouterr().err

  def test_a_cut_off_group_is_left_out_and_named(self, workdir, rows, capsys):
    path = workdir / "scores.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert command.main([str(workdir)]) == 0
    assert f"{M2BF}, seed 1, on ph2 is cut off" in capsys.readouterr().err
    kept = [r for r in rows if (r["arm"], r["seed"]) != (M2BF, 1)]
    assert (workdir / "table.md").read_text("utf-8") == (
      tables.make_tables(kept, META)["table.md"]
    )

  @pytest.mark.parametrize(
    ("file", "text", "words"),
    [
      ("scores.csv", None, "has no scores yet"),
      ("report.json", "{", "is no JSON"),
      ("report.json", "[]", "not a list"),
      ("report.json", '{"typo": 1}', "unknown keys typo"),
    ],
  )
  def test_the_error_says_what_is_wrong(
    self, workdir, capsys, file, text, words
  ):
    if text is None:
      (workdir / file).unlink()
    else:
      (workdir / file).write_text(text)
    assert command.main([str(workdir)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert str(workdir) in error or "typo" in error
    assert not (workdir / "table.md").exists()

  def test_a_lone_folder_without_protocol_says_so(self, workdir, capsys):
    (workdir / "report.json").unlink()
    assert command.main([str(workdir)]) == 0
    assert "no report.json" in capsys.readouterr().err
    assert "not stated" in (workdir / "table.md").read_text("utf-8")

  def test_an_unknown_protocol_is_not_merged_with_a_known_one(
    self, workdir, tmp_path, capsys
  ):
    other = tmp_path / "other"
    other.mkdir()
    scores.write(other / "scores.csv", make_rows("x-none", 0.8))
    args = [str(workdir), str(other), "--out", str(tmp_path)]
    assert command.main(args) == 1
    assert "has no report.json and others do" in capsys.readouterr().err
