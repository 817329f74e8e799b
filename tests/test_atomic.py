import pytest

from squeeze import atomic


def half_written(path):
    with atomic.replacing(path) as draft:
        draft.write_text("half", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        raise ZeroDivisionError


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic.write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        half_written(path)
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"
    atomic.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
