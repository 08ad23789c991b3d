"""docs/job.md is current, and what it shows works."""

from reelpool.cli import docs
from reelpool.scheduler.job import Job, load_job, load_jobs


def test_page_is_current():
    assert docs.PAGE.read_text(encoding="utf-8") == docs.job_page(), "run `make docs`"
    assert docs.main(["--check"]) == 0


def test_stale_page_is_found_and_written_anew(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "job.md"
    monkeypatch.setattr(docs, "PAGE", page)
    assert docs.main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().err
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    page.write_text("old")
    assert docs.main(["--check"]) == 1
    assert docs.main(["--chek"]) == 2


def test_page_has_a_row_for_every_field():
    page = docs.job_page()
    assert [name for name in Job.model_fields if f"| `{name}` |" not in page] == []
    assert all(field.description for field in Job.model_fields.values())


def test_examples_of_the_page_load(tmp_path):
    blocks = [part.split("```")[0] for part in docs.job_page().split("```yaml\n")[1:]]
    every, several = (tmp_path / "every.yaml", tmp_path / "several.yaml")
    every.write_text(blocks[0], encoding="utf-8")
    several.write_text(blocks[1], encoding="utf-8")
    assert load_job(every).model_fields_set == set(Job.model_fields)
    assert [job.seed for job in load_jobs(several)] == [1, 2]
