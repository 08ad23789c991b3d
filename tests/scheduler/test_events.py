import json

from reelpool.scheduler import events


def test_every_event_has_a_name_of_its_own_and_is_json():
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, events.Event) and kind is not events.Event]
    assert len(kinds) >= 10
    assert len({kind.kind for kind in kinds}) == len(kinds)


def test_json_holds_the_kind_and_all_fields():
    event = events.StageFinished("job-1", "decode", ("a", "b"), 1.5)
    assert json.loads(json.dumps(event.as_json())) == {
        "event": "stage_finished",
        "job": "job-1",
        "stage": "decode",
        "workers": ["a", "b"],
        "seconds": 1.5,
        "note": "",
    }
