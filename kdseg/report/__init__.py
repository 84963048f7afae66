"""What is made of the scores: scores.csv, tables, pictures.

* `scores`: reads and writes scores.csv, the source of everything else;
* `tables`: table.md, table.csv and table.tex from scores and report.json;
* `overlays`: a picture that compares arms on the same cases;
* `python -m kdseg.report WORKDIR ...` rebuilds the tables.
"""
