"""Cuts: no other one is better, told by trying them all; coarse cuts of a ladder are unions of fine ones."""

from itertools import combinations, pairwise, product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_models import MIB, make_device, make_profile

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.ladder import nested_ladder
from flexpipe_serve.planner.partition import best_boundaries, eq2_boundaries
from flexpipe_serve.planner.profile import Curve, StepShape

DECODE = StepShape(num_tokens=8, num_samples=8, num_context_tokens=4000)
PREFILL = StepShape(num_tokens=512, num_samples=1, num_pairs=130_000)

TOLERANCE = 1e-8


def slices(profile, boundaries):
    return list(zip((0, *boundaries), (*boundaries, profile.num_layers), strict=True))


def worth(profile, devices, shape, boundaries):
    """What is minimised: bottleneck, time of a pass, unevenness."""
    times = [
        profile.stage_seconds(a, b, shape, speed=d.speed)
        for d, (a, b) in zip(devices, slices(profile, boundaries), strict=True)
    ]
    by_compute = {}
    for device, time in zip(devices, times, strict=True):
        by_compute[device.compute] = by_compute.get(device.compute, 0.0) + time
    return max(by_compute.values()), sum(times), sum(time**2 for time in times)


def fits(profile, devices, boundaries, num_kv_tokens):
    need = {}
    for device, (a, b) in zip(devices, slices(profile, boundaries), strict=True):
        kv = (b - a) * profile.kv_bytes_per_token * num_kv_tokens
        need[device.domain] = need.get(device.domain, 0) + profile.stage_bytes(a, b) + device.overhead_bytes + kv
    memory = {device.domain: device.memory_bytes for device in devices}
    return all(need[domain] <= memory[domain] for domain in need)


def check_against_all(profile, devices, shape, num_kv_tokens=0):
    """Whether there is a split at all."""
    cuts = combinations(range(1, profile.num_layers), len(devices) - 1)
    possible = [cut for cut in cuts if fits(profile, devices, cut, num_kv_tokens)]
    found = best_boundaries(profile, devices, shape, num_kv_tokens=num_kv_tokens)
    if not possible:
        assert found is None
        return False
    assert found in possible
    # A tie between sums over devices of unequal speed is chance, and rounding may break it.
    for criterion in range(3 if len({device.speed for device in devices}) == 1 else 2):
        worths = {cut: worth(profile, devices, shape, cut)[criterion] for cut in possible}
        assert worths[found] == pytest.approx(min(worths.values()), rel=TOLERANCE)
        possible = [cut for cut in possible if worths[cut] <= worths[found] * (1 + TOLERANCE)]
    return True


def test_rounding_hides_no_split():
    """Times at speeds 0.2 and 0.4 are rounded for each, and the best split lay beyond its own bound."""
    nothing = Curve(counts=(1,), seconds=(0.0,))
    devices = [make_device(0, speed=0.2), make_device(1, speed=0.4)]
    for i in range(100):
        even = make_profile((0.1 + i * 1e-9,) * 30, stage_s=0.0)
        profile = msgspec.structs.replace(even, embedding=nothing, head=nothing)
        assert best_boundaries(profile, devices, DECODE) == (10,)


def sharings(num_stages):
    """Every way in which stages can share something: (0, 1, 0) means that the first and the third do."""
    return [
        groups
        for groups in product(range(num_stages), repeat=num_stages)
        if all(group <= max(groups[:i], default=-1) + 1 for i, group in enumerate(groups))
    ]


def test_no_split_is_better_in_all_small_cases():
    num_cases = num_possible = 0
    for num_stages in range(1, 5):
        for num_layers, computes, speeds in product(range(1, 7), sharings(num_stages), ((1, 1, 1, 1), (1, 2, 0.5, 3))):
            all_domains = sharings(num_stages) if num_stages < 4 else {computes, (0, 0, 0, 0), (0, 1, 2, 3)}
            for domains, memory_mib in product(all_domains, (1000, 26, 19)):
                sizes = [domains.count(domain) for domain in domains]
                devices = [
                    make_device(
                        i,
                        compute=f"c{computes[i]}",
                        domain=f"d{domains[i]}",
                        memory_bytes=memory_mib * sizes[i] * MIB,
                        overhead_bytes=MIB,
                        speed=speeds[computes[i]],
                    )
                    for i in range(num_stages)
                ]
                profile = make_profile((1.0,) * num_layers)
                num_possible += check_against_all(profile, devices, DECODE, num_kv_tokens=500)
                num_cases += 1
    assert num_cases == 2628
    assert 800 < num_possible < num_cases - 800


@st.composite
def cases(draw):
    num_stages = draw(st.integers(1, 5))
    num_layers = draw(st.integers(1, 9))
    scale = st.floats(0.1, 4)
    profile = make_profile(
        draw(st.lists(scale, min_size=num_layers, max_size=num_layers)),
        layer_bytes=draw(st.lists(st.integers(1, 9 * MIB), min_size=num_layers, max_size=num_layers)),
    )
    memory = [draw(st.integers(5, 60)) * MIB for _ in range(num_stages)]
    devices = []
    for i in range(num_stages):
        domain = draw(st.integers(0, num_stages - 1))
        devices.append(
            make_device(
                i,
                compute=f"c{draw(st.integers(0, num_stages - 1))}",
                domain=f"d{domain}",
                memory_bytes=memory[domain],
                overhead_bytes=draw(st.integers(0, MIB)),
                speed=draw(st.floats(0.2, 5)),
            )
        )
    return profile, devices, draw(st.sampled_from([DECODE, PREFILL])), draw(st.sampled_from([0, 1000, 5000]))


@given(cases())
def test_no_split_is_better(case):
    check_against_all(*case)


def test_a_faster_device_gets_more_layers():
    profile = make_profile()
    assert best_boundaries(profile, [make_device(0), make_device(1)], DECODE) == (7,)
    assert best_boundaries(profile, [make_device(0, speed=3.0), make_device(1)], DECODE) == (11,)


def test_a_small_device_gets_what_fits_however_fast_it_is():
    profile = make_profile(kv_bytes_per_token=4096)
    devices = [make_device(0, speed=10.0, memory_bytes=30 * MIB), make_device(1)]
    assert best_boundaries(profile, devices, DECODE) == (5,)
    assert best_boundaries(profile, devices, DECODE, num_kv_tokens=1024) == (2,)
    assert best_boundaries(profile, devices, DECODE, num_kv_tokens=8192) is None


def test_the_shape_moves_the_cut_where_the_ends_weigh_differently():
    profile = make_profile()
    devices = [make_device(0), make_device(1)]
    assert best_boundaries(profile, devices, DECODE) > best_boundaries(profile, devices, PREFILL)


def test_stages_that_share_a_compute_are_even():
    profile = make_profile((1.0,) * 12)
    devices = [make_device(i, compute="node", domain="node") for i in range(3)]
    assert best_boundaries(profile, devices, PREFILL) == (4, 8)


def test_more_stages_than_layers_do_not_fit():
    assert best_boundaries(make_profile((1.0,) * 3), [make_device(i) for i in range(4)], DECODE) is None


def eq2_worth(profile, devices, shape, boundaries, *, bytes_per_s, refactor_weight, cuts_to_keep, cycle_s):
    total = 0.0
    for device, (a, b) in zip(devices, slices(profile, boundaries), strict=True):
        if profile.stage_bytes(a, b) > device.memory_bytes:
            return float("inf")
        cycle = profile.stage_seconds(a, b, shape, speed=device.speed) + profile.stage_bytes(a, b) / bytes_per_s
        total += abs(cycle - cycle_s) + refactor_weight * (a != 0 and a not in cuts_to_keep)
    return total


@given(
    scale=st.lists(st.floats(0.2, 3), min_size=4, max_size=9),
    speeds=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=4),
    refactor_weight=st.sampled_from([0.0, 0.001, 1.0]),
    cycle_s=st.floats(0.001, 0.05),
    memory_mib=st.sampled_from([1000, 35, 20]),
)
def test_no_split_is_better_by_eq2(scale, speeds, refactor_weight, cycle_s, memory_mib):
    profile = make_profile(scale)
    devices = [make_device(i, speed=speed, memory_bytes=memory_mib * MIB) for i, speed in enumerate(speeds)]
    terms = {"bytes_per_s": 1e10, "refactor_weight": refactor_weight, "cuts_to_keep": (3, 6), "cycle_s": cycle_s}
    cuts = combinations(range(1, profile.num_layers), len(devices) - 1)
    best = min((eq2_worth(profile, devices, DECODE, cut, **terms) for cut in cuts), default=float("inf"))
    found = eq2_boundaries(profile, devices, DECODE, **terms)
    if best == float("inf"):
        assert found is None
    else:
        assert eq2_worth(profile, devices, DECODE, found, **terms) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_the_refactoring_term_moves_cuts_to_those_to_keep():
    profile = make_profile()
    devices = [make_device(i) for i in range(3)]
    free = eq2_boundaries(profile, devices, DECODE, bytes_per_s=1e10, refactor_weight=0.0, cuts_to_keep=(3, 6, 9))
    kept = eq2_boundaries(profile, devices, DECODE, bytes_per_s=1e10, refactor_weight=1.0, cuts_to_keep=(3, 6, 9))
    assert not set(free) <= {3, 6, 9}
    assert set(kept) <= {3, 6, 9}


@given(scale=st.lists(st.floats(0.2, 3), min_size=1, max_size=20), data=st.data())
def test_coarse_cuts_of_a_ladder_are_unions_of_fine_ones(scale, data):
    profile = make_profile(scale)
    max_stages = data.draw(st.integers(1, len(scale)))
    rungs = nested_ladder(profile, DECODE, max_stages=max_stages)
    assert [len(rung) + 1 for rung in rungs] == list(range(1, max_stages + 1))
    for coarse, fine in pairwise(rungs):
        assert set(coarse) < set(fine)
    devices = [make_device(i) for i in range(max_stages)]
    assert rungs[-1] == best_boundaries(profile, devices, DECODE)


def test_a_ladder_halves_evenly():
    rungs = nested_ladder(make_profile((1.0,) * 64, stage_s=0.0), PREFILL, max_stages=8)
    for num_stages in (2, 4, 8):
        edges = (0, *rungs[num_stages - 1], 64)
        sizes = [b - a for a, b in pairwise(edges)]
        assert max(sizes) - min(sizes) <= 2


def test_no_ladder_of_more_stages_than_layers():
    with pytest.raises(ConfigError, match="4 stages for 3 layers"):
        nested_ladder(make_profile((1.0,) * 3), DECODE, max_stages=4)
