"""Bytes and times of collectives against a simulation that passes the messages."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.plan.collectives import sent_bytes
from moecc.plan.machines import parse_machine
from moecc.plan.networks import Dim, TorusRoute


class Devices:
    """Devices that count what they send."""

    def __init__(self, count):
        self.count = count
        self.sent = [0] * count

    def send(self, source, target, data):
        if source != target:
            self.sent[source] += data.nbytes
        return data.copy()


def ring_all_gather(devices, parts):
    """Each device passes on what it received last, n − 1 times."""
    n = devices.count
    held = [{i: parts[i]} for i in range(n)]
    for turn in range(n - 1):
        moved = [(i, (i - turn) % n) for i in range(n)]
        for i, which in moved:
            held[(i + 1) % n][which] = devices.send(i, (i + 1) % n, held[i][which])
    return [np.concatenate([h[i] for i in range(n)]) for h in held]


def ring_reduce_scatter(devices, values):
    """Sums travel once round, each device adding its own part."""
    n = devices.count
    parts = [list(np.split(v, n)) for v in values]
    for turn in range(n - 1):
        moved = [(i, (i - turn - 1) % n) for i in range(n)]
        arrived = [(i, which, devices.send(i, (i + 1) % n, parts[i][which])) for i, which in moved]
        for i, which, data in arrived:
            parts[(i + 1) % n][which] = parts[(i + 1) % n][which] + data
    return [parts[i][i] for i in range(n)]


def exchange(devices, values):
    n = devices.count
    parts = [np.split(v, n) for v in values]
    return [np.concatenate([devices.send(j, i, parts[j][i]) for j in range(n)]) for i in range(n)]


@given(n=st.integers(1, 9), each=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_a_device_sends_is_what_is_counted(n, each, seed):
    draw = np.random.default_rng(seed)
    values = [draw.integers(0, 9, n * each) for _ in range(n)]
    total = values[0].nbytes

    devices = Devices(n)
    scattered = ring_reduce_scatter(devices, values)
    assert set(devices.sent) == {sent_bytes("reduce_scatter", n, total)}
    np.testing.assert_array_equal(np.concatenate(scattered), sum(values))

    gathered = ring_all_gather(devices, scattered)
    assert set(devices.sent) == {sent_bytes("all_reduce", n, total)}
    for found in gathered:
        np.testing.assert_array_equal(found, sum(values))

    devices = Devices(n)
    ring_all_gather(devices, [np.split(v, n)[i] for i, v in enumerate(values)])
    assert set(devices.sent) == {sent_bytes("all_gather", n, total)}

    for op in ("all_to_all", "ragged_all_to_all"):
        devices = Devices(n)
        exchanged = exchange(devices, values)
        assert set(devices.sent) == {sent_bytes(op, n, total)}
        assert sorted(np.concatenate(exchanged)) == sorted(np.concatenate(values))


def busiest_link(n, wrap, local_bytes):
    """Return the bytes over the busiest link of a row in an all-to-all by shortest ways."""
    load = {}
    for source in range(n):
        for target in range(n):
            for way, share in ways(source, target, n, wrap):
                for a, b in pairwise(way):
                    load[a, b] = load.get((a, b), 0.0) + share * local_bytes / n
    return max(load.values(), default=0.0)


def ways(source, target, n, wrap):
    step = 1 if target > source else -1
    straight = list(range(source, target + step, step))
    if not wrap or source == target:
        return [(straight, 1.0)]
    forward, back = (target - source) % n, (source - target) % n
    right = [(source + i) % n for i in range(forward + 1)]
    left = [(source - i) % n for i in range(back + 1)]
    if forward == back:
        return [(right, 0.5), (left, 0.5)]
    return [(right if forward < back else left, 1.0)]


@pytest.mark.parametrize("n", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("wrap", [False, True])
def test_an_exchange_takes_what_its_busiest_link_carries(n, wrap):
    dim = Dim(n, wrap, 1.0)
    if n == 2 and wrap:
        # Two links between two devices: both ways round are one hop.
        assert dim.exchange_seconds(1.0) == 0.25
        return
    assert dim.exchange_seconds(1.0) == pytest.approx(busiest_link(n, wrap, 1.0))


@pytest.mark.parametrize(
    "name", ["tpu:v4:8x8x8", "tpu:v5e:4x8", "tpu:v5p:4x4x8", "tpu:tpu7x:2x2x2", "gpu:h100:32"]
)
@settings(max_examples=30)
@given(data=st.data())
def test_every_axis_of_every_mesh_has_its_devices(name, data):
    from moecc.plan.search import meshes

    machine = parse_machine(name)
    mesh = data.draw(st.sampled_from(list(meshes(machine.devices))))
    routes = machine.network.routes(dict(mesh.axes))
    for axes, route in routes.items():
        assert route.devices == mesh.size(axes)
        if isinstance(route, TorusRoute):
            assert np.prod([d.size for d in route.dims], initial=1) == route.devices
        if route.devices > 1:
            assert route.all_gather(1e9) > 0
            assert route.all_to_all(1e9) > 0
