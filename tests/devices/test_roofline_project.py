"""Projections: the right figure under a known law, always with basis and error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shortstack.devices.roofline.catalogue import catalogue, find, recognise
from shortstack.devices.roofline.points import MEASURED, VENDOR, groups, points
from shortstack.devices.roofline.project import fit, memory_errors, project, project_all
from shortstack.devices.roofline.room import Target, target
from shortstack.errors import ShortstackError

from .roofline_sample import GB, H200_BANDWIDTH, a_record, a_run, obeying

FULL, HALF = 13.5 * GB, 7 * GB
CARDS = {"NVIDIA H200": 4800 * GB, "NVIDIA GeForce RTX 3090": 936 * GB, "NVIDIA L4": 300 * GB}
GOAL = Target("a model", "llama.cpp", "x", 8 * GB, 8 * GB, 100_000, 4096)


def on_one_card() -> dict[str, object]:
    return a_run(
        a_record(step_s=obeying(H200_BANDWIDTH, FULL), weights=FULL, overhead=GB),
        a_record(step_s=obeying(H200_BANDWIDTH, HALF), weights=HALF, label="pruned", overhead=GB),
    )


def test_a_fit_of_measured_runs_projects_the_law_that_they_obey() -> None:
    fitted = fit(points([on_one_card()])[0])
    assert fitted.line.overhead_s == pytest.approx(0.0002)
    assert fitted.line.efficiency == pytest.approx(0.6)
    made = project(find("rtx-4090"), GOAL, fitted)
    read = 8 * GB + 100_000 * 4096
    assert made.decode_tokens_per_s == pytest.approx(1 / (0.0002 + read / (0.6 * 1008 * GB)))


def test_with_one_device_the_error_across_devices_is_unknown_and_said_to_be() -> None:
    made = project(find("rtx-4090"), GOAL, fit(points([on_one_card()])[0]))
    assert (made.low_tokens_per_s, made.high_tokens_per_s) == (None, None)
    assert "fitted on H200 SXM 141GB alone: the error across devices is unknown" in made.notes
    assert made.fit.across_devices is None
    models = made.fit.across_models
    assert models is not None
    assert len(models.relative) == 2
    # Of one model alone the overhead cannot be told: it is the error that is left.
    assert 0 < models.largest < 0.1


def test_several_devices_give_the_error_that_the_fit_makes_on_each() -> None:
    runs = [
        a_run(
            *(
                a_record(
                    step_s=obeying(speed, w) * (1.2 if "L4" in name else 1),
                    weights=w,
                    name=name,
                    label=label,
                )
                for w, label in ((FULL, "original"), (HALF, "pruned"))
            )
        )
        for name, speed in CARDS.items()
    ]
    fitted = fit(points(runs)[0])
    assert fitted.n_devices == 3
    assert fitted.across_devices is not None
    assert len(fitted.across_devices.relative) == 6
    # The L4 is 20 % slower than the law of the others: they predict 1.2 times its rate.
    assert fitted.across_devices.largest == pytest.approx(0.2, abs=0.03)
    made = project(find("rtx-4090"), GOAL, fitted)
    assert made.low_tokens_per_s is not None
    assert made.high_tokens_per_s is not None
    assert made.low_tokens_per_s < made.decode_tokens_per_s < made.high_tokens_per_s
    assert not any("unknown" in note for note in made.notes)


def test_every_projection_knows_its_records_and_sources() -> None:
    made, refused = project_all([on_one_card()])
    assert refused == []
    # Two models on every card but the one that was measured.
    assert len(made) == 2 * (sum(d.kind == "gpu" for d in catalogue().values()) - 1)
    for found in made:
        assert found.device.bandwidth_bytes_per_s.source.startswith("NVIDIA, ")
        assert [p.record for p in found.fit.points] == [
            "01234567: original gguf-f16, llama.cpp, cuda:0",
            "01234567: pruned gguf-f16, llama.cpp, cuda:0",
        ]
        assert found.device.id != "h200-sxm"


def test_memory_is_weights_cache_and_the_overhead_that_was_measured() -> None:
    made = project(find("l4"), GOAL, fit(points([on_one_card()])[0]))
    assert made.need is not None
    assert made.need.total_bytes == 8 * GB + 100_000 * 4096 + GB
    placed = made.fits()
    assert placed is not None
    assert [row.fits for row in placed] == [True]
    small = project(find("rtx-4060"), GOAL, fit(points([on_one_card()])[0])).fits()
    assert small is not None
    assert [row.fits for row in small] == [False]


def test_the_error_of_memory_is_that_of_the_overhead_of_the_others() -> None:
    run = a_run(
        a_record(step_s=0.01, weights=9 * GB, overhead=1 * GB),
        a_record(step_s=0.02, weights=18 * GB, overhead=2 * GB, label="large"),
    )
    made = points([run])[0]
    assert memory_errors(made, "device") is None
    errors = memory_errors(made, "model")
    assert errors is not None
    assert errors.relative == pytest.approx((1 / 10, -1 / 20))


def test_measured_bandwidth_serves_where_no_vendor_s_is_known_and_this_is_noted() -> None:
    record = a_record(step_s=obeying(50 * GB, FULL), weights=FULL, device="cpu")
    fitted = fit(points([a_run(record, read=50 * GB)])[0])
    assert fitted.basis == MEASURED
    made = project(find("ryzen-7-7840u-ddr5-5600"), GOAL, fitted)
    assert any("the projection is too high" in note for note in made.notes)
    assert any("no overhead a token" in note for note in fitted.notes)
    apple = project(find("apple-m2"), GOAL, fitted)
    assert "unified memory is projected from records of cpu runs" in apple.notes


def test_a_part_of_a_card_does_not_get_the_whole_card_s_bandwidth() -> None:
    record = a_record(step_s=0.01)
    record["device_info"]["mig"] = True
    assert points([a_run(record)]) == (
        [],
        [
            "01234567: original gguf-f16, llama.cpp, cuda:0: the bandwidth of cuda:0 was not "
            "measured and it is in no catalogue"
        ],
    )
    (point,), _ = points([a_run(record, read=600 * GB)])
    assert dict(point.bandwidths) == {MEASURED: 600 * GB}


def test_records_without_a_step_are_refused_with_the_reason() -> None:
    dead = {**a_record(step_s=0.01), "trials": []}
    made, refused = points([a_run(dead, a_record(step_s=0.01, weights=0))])
    assert made == []
    assert refused[0].endswith("no timed trial ended")
    assert refused[1].endswith("how many bytes a token reads is unknown")


def test_unlike_records_are_never_fitted_together() -> None:
    runs = [a_run(*(a_record(step_s=0.01, precision=p) for p in ("F16", "Q4_0")))]
    made = points(runs)[0]
    assert len(groups(made)) == 2
    asked = {**a_record(step_s=0.02), "options": {"gpu_layers": "4"}}
    assert len(groups(points([a_run(a_record(step_s=0.01), asked)])[0])) == 2
    with pytest.raises(ShortstackError, match="these are of 2"):
        fit(made)
    with pytest.raises(ShortstackError, match="these are of 0"):
        fit([])


def test_a_record_of_another_basis_is_left_out_and_named() -> None:
    known = a_record(step_s=0.01)
    odd = a_record(step_s=0.01, name="A card of tomorrow", label="pruned")
    made = points([a_run(known), a_run(odd, read=500 * GB)])[0]
    fitted = fit(made)
    assert fitted.basis == MEASURED
    assert [p.device for p in fitted.points] == ["A card of tomorrow"]
    assert "original gguf-f16, llama.cpp, cuda:0 is left out" in fitted.notes[0]


def test_a_model_that_no_fit_holds_is_not_projected() -> None:
    known = a_record(step_s=0.01, label="one", name="NVIDIA L4")
    odd = a_record(step_s=0.01, name="A card of tomorrow", label="other")
    found, _ = project_all([a_run(known), a_run(odd, read=500 * GB)])
    assert {p.target.label for p in found} == {"other"}
    assert "l4" in {p.device.id for p in found}


def test_a_model_is_projected_at_every_context_it_was_measured_with() -> None:
    run = a_run(a_record(step_s=0.01), a_record(step_s=0.02, depth_tokens=4096))
    found, _ = project_all([run])
    here = [p.target.context_tokens for p in found if p.device.id == "l4"]
    assert here == [641, 4096 + 641]


def test_far_from_what_was_measured_is_called_extrapolated() -> None:
    fitted = fit(points([on_one_card()])[0])
    near, far = find("h100-sxm"), find("l4")
    assert not any("extrapolated" in n for n in project(near, GOAL, fitted).notes)
    assert any("extrapolated" in n for n in project(far, GOAL, fitted).notes)


def test_a_batch_gives_its_tokens_for_one_reading_of_the_weights() -> None:
    record = a_record(step_s=obeying(H200_BANDWIDTH, FULL), weights=FULL, batch=8)
    fitted = fit(points([a_run(record)])[0])
    made = project(find("h200-sxm"), target(record), fitted)
    assert made.decode_tokens_per_s == pytest.approx(8 / obeying(H200_BANDWIDTH, FULL))


def test_each_figure_of_the_catalogue_has_a_source_and_products_are_right() -> None:
    assert len(catalogue()) > 30
    for device in catalogue().values():
        figures = [device.bandwidth_bytes_per_s, device.power_w, *device.dense_ops_per_s.values()]
        assert device.memory_source
        for figure in figures:
            assert figure is None or re.match("(NVIDIA|Intel|AMD|Apple), ", figure.source)
        note = device.bandwidth_bytes_per_s.note or ""
        if product := re.match(r"(?:(\d) x )?(\d+) bytes x (\d+) MT/s", note):
            channels, width, speed = (int(n or 1) for n in product.groups())
            expected = channels * width * speed * 1e6
            assert device.bandwidth_bytes_per_s.value == pytest.approx(expected, rel=0.001)
        elif product := re.match(r"(\d+) bit x (\d+) Gbit/s", note):
            expected = int(product[1]) * int(product[2]) / 8 * 1e9
            assert device.bandwidth_bytes_per_s.value == expected


def test_cards_are_recognised_by_the_name_that_the_driver_gives() -> None:
    h200 = recognise("NVIDIA H200")
    assert h200 is find("h200-sxm")
    assert h200.bandwidth_bytes_per_s.value == H200_BANDWIDTH
    assert recognise("NVIDIA H200 NVL") is recognise(None) is None
    spellings = [s for d in catalogue().values() for s in d.spellings]
    assert len(spellings) == len(set(spellings))
    with pytest.raises(ShortstackError, match="Did you mean 'rtx-4090'"):
        find("rtx4090")


@pytest.mark.parametrize(
    ("entry", "fact"),
    [
        ("{name: A, kind: tpu, bandwidth: [1, s], memory: [[1], s]}", "kind 'tpu'"),
        ("{name: A, kind: gpu, bandwidth: [0, s], memory: [[1], s]}", "0 is no figure above 0"),
        ("{name: A, kind: gpu, bandwidth: [1, t], memory: [[1], s]}", "'t'"),
        ("{name: A, kind: gpu, bandwidth: [1, s], memory: [[2, 1], s]}", "must ascend"),
        ("{name: A, kind: gpu, bandwith: [1, s], memory: [[1], s]}", "unknown fields"),
        ("{name: A, kind: gpu, memory: [[1], s]}", "'bandwidth'"),
        ("[", "while parsing"),
    ],
)
def test_a_damaged_catalogue_is_one_line(tmp_path: Path, entry: str, fact: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"sources: {{s: a page}}\ndevices:\n  a: {entry}\n")
    with pytest.raises(ShortstackError) as error:
        catalogue(file)
    assert str(error.value).startswith("own.yaml is damaged: ")
    assert fact in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vendor_s_basis_is_used_where_all_have_it() -> None:
    record = a_record(step_s=0.01)
    assert fit(points([a_run(record, read=4000 * GB)])[0]).basis == VENDOR
