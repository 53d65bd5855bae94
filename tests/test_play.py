"""A world model is played: the session's logic, the page's protocol and its refusals, and the page itself in
Chromium.

Run: pytest tests/test_play.py
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from tiny_run import tiny_config, write_checkpoint

import worldvla
from worldvla.cli import main
from worldvla.data.episode import read_episodes
from worldvla.data.sources import open_source
from worldvla.files import read_json, write_digests, write_json
from worldvla.infer.world import World
from worldvla.serve.play.server import MAX_MESSAGE, MAX_SESSIONS, Start, read_message, serve
from worldvla.serve.play.session import GRIPPER_STEPS, REPLAN, Playable, Session, bench, open_playable, psnr
from worldvla.sim.suites import make, tasks

SUITE = "tabletop_object"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(root)
    config = replace(config, data=replace(config.data, sequence_length=120))
    return write_checkpoint(config, tmp_path_factory.mktemp("play") / "run/ckpt/step_0")


@pytest.fixture(scope="module")
def playable(checkpoint: Path) -> Playable:
    return open_playable(worldvla.load(checkpoint))


@pytest.fixture
def session(playable: Playable) -> Session:
    return Session(playable, SUITE, 0, init=3)


# -- the session


def test_a_person_steers_both_worlds_from_the_same_initial_state(session: Session, playable: Playable):
    world, env = World(playable.model), make(session.task, playable.model.view_sizes)
    observation, _ = env.reset(options={"init": 3})
    imagined: Any = world.reset(observation)
    session.show(True)
    session.move = (0.5, -1.0, 0.25, 0.0)  # right, nearer, up: x, -y, z of the tabletop
    for _ in range(2):
        session.step()
        action = session.action
        imagined, observation = world.step(action), env.step(action)[0]
    statistics = playable.model.builder.statistics
    wanted = np.clip([0.5, -1, 0.25, 0, 0, 0, -1], statistics.action_low, statistics.action_high)
    np.testing.assert_allclose(session.action, wanted, atol=1e-6)
    assert session.real is not None
    for view, frame in session.frame.items():
        np.testing.assert_array_equal(frame, imagined[view])
        np.testing.assert_array_equal(session.real[view], observation[view])
    status = session.status()
    assert (status["steps"], status["imagined"], status["driver"]) == (2, 2, "person")
    assert status["psnr"]["wrist"] == round(psnr(imagined["wrist"], observation["wrist"]), 1)


def test_the_world_of_a_person_without_a_key_stands_still(session: Session):
    assert not session.is_moving
    session.toggle_gripper()
    for _ in range(GRIPPER_STEPS):
        assert session.is_moving
        session.step()
    assert not session.is_moving
    assert session.status()["gripper"] == "closed"


def test_the_policy_acts_on_imagined_frames_and_replans(session: Session, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def act(observation: Any) -> np.ndarray:
        seen.append(observation)
        return np.full((5, 7), 0.1 * len(seen), dtype=np.float32)

    monkeypatch.setattr(session.playable.policy, "act", act)
    session.drive("policy")
    first = session.frame
    for _ in range(REPLAN + 1):
        session.step()
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0]["agentview"], first["agentview"])
    assert seen[0]["previous"] == []
    assert len(seen[1]["previous"]) == 1  # the model's history is two frames
    assert seen[1]["instruction"] == session.task.instruction
    assert session.action[0] == np.float32(0.2)
    session.drive("person")
    assert session.gripper == 1.0  # as the policy left it
    assert not session.is_moving


def test_back_to_reality_takes_the_frame_of_the_simulator(session: Session, playable: Playable):
    session.move = (1.0, 0.0, 0.0, 0.0)
    for _ in range(4):
        session.step()
    assert session.real is None  # nobody looks, so its cameras are off
    session.back_to_reality()
    assert session.real is not None
    wanted: Any = World(playable.model).reset(session.real)
    np.testing.assert_array_equal(session.frame["agentview"], wanted["agentview"])
    assert (session.imagined, session.steps) == (0, 4)
    session.start(SUITE, 1, 0)
    assert (session.steps, session.task.index) == (0, 1)


def test_recordings_are_a_film_and_episodes_of_both_worlds(session: Session, tmp_path: Path):
    session.record()
    assert session.stop_recording() is None  # nothing happened
    session.record()
    before, actions = session.frame, []
    session.move = (0.0, 0.6, 0.0, 0.0)
    for _ in range(3):
        session.step()
        actions.append(session.action)
    recording = session.stop_recording()
    assert recording is not None
    recording.write(tmp_path)
    assert (tmp_path / "play.mp4").read_bytes()[4:8] == b"ftyp"
    imagined, real = (
        next(read_episodes(tmp_path / f"{name}_demo.hdf5")) for name in ("imagined", "simulator")
    )
    for episode in (imagined, real):
        np.testing.assert_array_equal(episode.actions, actions)
        assert (episode.init, episode.suite, episode.is_expert.any()) == (3, SUITE, False)
    np.testing.assert_array_equal(imagined.images["agentview"][0], before["agentview"])
    env: Any = make(session.task, session.playable.model.view_sizes)
    env.reset(options={"init": 3})
    for t, action in enumerate(actions):
        np.testing.assert_array_equal(real.images["wrist"][t], env.observe()["wrist"])
        np.testing.assert_array_equal(real.sim_states[t], env.get_state())
        env.step(action)


def test_a_demonstration_ends_at_its_success_and_teaches_what_a_person_did(session: Session, tmp_path: Path):
    session.record()
    for driver in ("policy", "person", "person", "person"):
        session.drive(driver)
        session.move = (0.0, 0.6, 0.0, 0.0)
        session.step()
    recording = session.stop_recording()
    assert recording is not None
    failed = next(read_episodes(recording.write_demonstration(tmp_path / "failed_demo.hdf5")))
    assert (len(failed), failed.success, failed.is_expert.any()) == (4, False, False)
    recording.success_steps = 3
    done = next(read_episodes(recording.write_demonstration(tmp_path / "done_demo.hdf5")))
    assert (len(done), done.success, done.is_expert.tolist()) == (3, True, [False, True, True])
    np.testing.assert_array_equal(done.images["wrist"], failed.images["wrist"][:3])
    np.testing.assert_array_equal(done.states, failed.states[:3])


def test_the_step_of_success_is_noted(session: Session, monkeypatch: pytest.MonkeyPatch):
    session.record()
    step = session._env.step
    for done in (False, True, True):
        monkeypatch.setattr(session._env, "step", lambda a, d=done: (*step(a)[:2], d, False, {"grasped": d}))
        session.step()
    assert session.recording is not None
    assert session.recording.success_steps == 2


def test_bench_counts_every_frame(playable: Playable):
    found = bench(playable, SUITE, 0, 0, 2)
    assert found["frames"] == 2
    for driver in ("person", "policy"):
        assert found[driver]["cpu_ms_a_frame"] > 0
        assert found[driver]["passes_a_frame"] >= 1


# -- refusals


def altered(checkpoint: Path, folder: Path, part: str, **values: Any) -> Path:
    path = Path(shutil.copytree(checkpoint, folder / "altered"))
    config = read_json(path / "config.json")
    write_json(path / "config.json", config | {part: config[part] | values})
    write_digests(path)
    return path


@pytest.mark.parametrize(
    ("part", "values", "line"),
    [
        ("data", {"world_fraction": 0.0}, "has no world model"),
        ("layout", {"action_conditioning": False}, "without reading actions"),
        ("layout", {"views": ["agentview", "elbow"]}, r"no simulator for the views \['elbow'\]"),
    ],
)
def test_checkpoints_that_cannot_be_played(
    checkpoint: Path, tmp_path: Path, part: str, values: Any, line: str
):
    with pytest.raises(ValueError, match=line):
        open_playable(worldvla.load(altered(checkpoint, tmp_path, part, **values)))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--task", "tabletop_object"], "expected SUITE:INDEX"),
        (["--task", "tabletop_objekt:0"], "did you mean tabletop_object"),
        (["--task", "tabletop_object:99"], "has no task 99: expected 0..9"),
        (["--temperature", "-1"], "--temperature and --bench from 0 on"),
        (["--host", "0.0.0.0"], "set WORLDVLA_API_KEY"),
    ],
)
def test_bad_options_are_one_line(
    checkpoint: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["play", str(checkpoint), *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", str(checkpoint), "--port", str(port)]) == 2
    assert f"port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[" * 4000,
        '{"type": "move", "right": 2, "away": 0, "up": 0, "turn": 0}',
        '{"type": "move", "right": NaN, "away": 0, "up": 0, "turn": 0}',
        '{"type": "start", "suite": "tabletop_object", "task": true, "init": 0}',
        '{"type": "pause"}',
        '{"type": "exec"}',
    ],
)
def test_a_message_that_is_none_is_refused(text: str):
    with pytest.raises(ValueError, match="page"):
        read_message(text)


# -- the protocol


def run_served(
    playable: Playable,
    out: Path,
    use: Callable[[str, aiohttp.ClientSession], Awaitable[None]],
    **options: Any,
) -> None:
    """Serve while `use(address, client)` runs."""

    async def both() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        start = Start(SUITE, 0, 3)
        server = asyncio.create_task(
            serve(playable, start, port=0, out=out, on_start=address.set_result, **options)
        )
        try:
            async with aiohttp.ClientSession() as client:
                await asyncio.wait_for(use(await address, client), 60)
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)

    asyncio.run(both())


async def frame(page: aiohttp.ClientWebSocketResponse) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the next frame's header and its pictures; other messages are passed over."""
    while True:
        message = await page.receive(timeout=30)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        if message.type == aiohttp.WSMsgType.BINARY:
            length = int.from_bytes(message.data[:4], "little")
            header, offset, pictures = json.loads(message.data[4 : 4 + length]), 4 + length, {}
            for world, view, rows, cols in header["pictures"]:
                pixels = np.frombuffer(message.data, np.uint8, 4 * rows * cols, offset)
                pictures[f"{world}/{view}"] = pixels.reshape(rows, cols, 4)[..., :3]
                offset += 4 * rows * cols
            assert offset == len(message.data)
            return header, pictures


async def text(page: aiohttp.ClientWebSocketResponse, kind: str) -> dict[str, Any]:
    """Return the next message of a type."""
    while True:
        message = await page.receive(timeout=30)
        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
        if message.type == aiohttp.WSMsgType.TEXT and (found := message.json())["type"] == kind:
            return found


START = {"type": "start", "suite": SUITE, "task": 0, "init": 3}
STILL = {"type": "move", "right": 0, "away": 0, "up": 0, "turn": 0}


def test_a_page_plays(playable: Playable, tmp_path: Path):
    async def use(address: str, client: aiohttp.ClientSession) -> None:
        async with client.ws_connect(f"{address}socket") as page:
            hello = await text(page, "hello")
            assert (hello["rate"], hello["start"]) == (12.5, {"suite": SUITE, "task": 0, "init": 3})
            assert len(hello["suites"]["tabletop_goal"]) == 10
            await page.send_json(START)
            header, pictures = await frame(page)
            assert header["imagined"] == 0
            assert list(pictures) == ["imagined/agentview", "imagined/wrist"]
            await page.send_json({"type": "record", "on": True})
            assert (await frame(page))[0]["recorded"] == 0
            began = time.monotonic()
            await page.send_json({**STILL, "right": 0.5})
            headers = [(await frame(page))[0] for _ in range(4)]
            assert [h["steps"] for h in headers] == [1, 2, 3, 4]
            assert headers[-1]["action"][0] == pytest.approx(0.5, abs=0.2)
            assert time.monotonic() - began > 3 / 12.5  # never faster than the control rate
            await page.send_json({"type": "drive", "driver": "policy"})
            while (await frame(page))[0]["driver"] != "policy":
                pass
            await page.send_json({**STILL, "away": -1})  # a key takes over
            while (await frame(page))[0]["driver"] != "person":
                pass
            await page.send_json(STILL)
            await page.send_json({"type": "simulator", "on": True})
            while "psnr" not in header or header["psnr"] is None:
                header, pictures = await frame(page)
            assert set(pictures) == {
                f"{w}/{v}" for w in ("imagined", "simulator") for v in playable.model.view_sizes
            }
            await page.send_json({"type": "pause", "on": True})
            while not (await frame(page))[0]["paused"]:
                pass
            await page.send_json({"type": "step"})
            assert (await frame(page))[0]["paused"]
            await page.send_json({"type": "record", "on": False})
            recorded = await text(page, "recorded")
            assert len(recorded["files"]) == 3
            for file in recorded["files"]:
                async with client.get(f"{address}recordings/{file}") as response:
                    assert await response.read() == (tmp_path / file).read_bytes()
            await page.send_json({**START, "suite": "tabletop_objekt"})
            assert "did you mean" in (await text(page, "error"))["text"]
            await page.send_json({**START, "init": 50})
            assert "no initial state 50" in (await text(page, "error"))["text"]

    run_served(playable, tmp_path, use)


def test_recordings_of_one_second_are_files_of_their_own(playable: Playable, tmp_path: Path, monkeypatch):
    """All sessions end when the server does, and with them their recordings."""
    monkeypatch.setattr("time.strftime", lambda *_: "20260101_000000")

    async def use(address: str, client: aiohttp.ClientSession) -> None:
        pages = [await client.ws_connect(f"{address}socket") for _ in range(3)]
        for page in pages:
            await page.send_json({**START, "init": 50})  # refused, and recorded all the same
            await page.send_json(START)
            await page.send_json({**STILL, "right": 0.5})
            while (await frame(page))[0]["steps"] < 2:
                pass

    run_served(playable, tmp_path / "films", use, save_dataset=tmp_path / "data")
    assert len(list((tmp_path / "data").glob("*_demo.hdf5"))) == 3


def test_an_initial_state_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["play", "--init", "60"]) == 2
    assert "--init 0 to 49" in capsys.readouterr().err


def test_who_may_not_play_is_turned_away(playable: Playable, tmp_path: Path):
    async def status(client: aiohttp.ClientSession, url: str, **headers: str) -> int:
        async with client.get(url, headers=headers) as response:
            return response.status

    async def use(address: str, client: aiohttp.ClientSession) -> None:
        good, foreign = {"Origin": address.rstrip("/")}, {"Origin": "http://elsewhere.example"}
        assert await status(client, f"{address}?key=secret", **good) == 200
        assert await status(client, f"{address}?key=guess", **good) == 401
        assert await status(client, f"{address}?key=secret", **foreign) == 403
        assert await status(client, f"{address}?key=secret", Host="elsewhere.example") == 403
        assert await status(client, f"{address}recordings/..%2f/config.json?key=secret") == 404
        assert await status(client, f"{address}healthz") == 200
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await client.ws_connect(f"{address}socket?key=secret", headers=foreign)
        pages = [await client.ws_connect(f"{address}socket?key=secret") for _ in range(MAX_SESSIONS)]
        for page in pages:
            await text(page, "hello")
        crowd = await client.ws_connect(f"{address}socket?key=secret")
        assert "play already" in (await text(crowd, "error"))["text"]
        await pages[0].send_str(json.dumps({"type": "x" * MAX_MESSAGE}))
        assert (await pages[0].receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR)
        await pages[1].send_str("nonsense")
        assert "must be JSON" in (await text(pages[1], "error"))["text"]
        await pages[2].send_json(START)  # the others play on
        assert (await frame(pages[2]))[0]["steps"] == 0
        for page in [*pages, crowd]:
            await page.close()

    run_served(playable, tmp_path, use, api_key="secret")


# -- the command line, and the page


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def launch(checkpoint: Path, port: int, out: Path, *options: str) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-m",
        "worldvla",
        "play",
        str(checkpoint),
        "--port",
        str(port),
        "--out",
        str(out),
        *options,
    ]
    server = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert server.stdout is not None
    assert "play at" in server.stdout.readline()
    return server


def stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    assert server.wait(60) == 0
    assert server.stdout is not None
    server.stdout.close()


def test_every_episode_is_saved_as_the_page_showed_it(checkpoint: Path, tmp_path: Path):
    """By the command line. The last start ends the second episode, and has no steps of its own."""
    port, data = free_port(), tmp_path / "data"
    shown: dict[tuple[int, int], tuple[list[float], dict[str, np.ndarray]]] = {}

    async def see(page: aiohttp.ClientWebSocketResponse) -> dict[str, Any]:
        header, pictures = await frame(page)
        shown[header["init"], header["steps"]] = header["action"], pictures
        return header | {"is_real": "simulator/agentview" in pictures}

    async def use() -> None:
        async with (
            aiohttp.ClientSession() as client,
            client.ws_connect(f"http://127.0.0.1:{port}/socket") as page,
        ):
            for init in (3, 4, 5):
                await page.send_json({**START, "init": init})
                await page.send_json({"type": "simulator", "on": True})
                while (header := await see(page))["init"] != init or not header["is_real"]:
                    pass
                if init == 5:
                    break
                await page.send_json({**STILL, "right": 0.5})
                while (await see(page))["steps"] < 3:
                    pass
                await page.send_json(STILL)

    server = launch(checkpoint, port, tmp_path / "films", "--save-dataset", str(data))
    try:
        asyncio.run(asyncio.wait_for(use(), 100))
    finally:
        stop(server)
    episodes = {episode.init: episode for episode in open_source(data).episodes()}
    assert sorted(episodes) == [3, 4]
    for init, episode in episodes.items():
        assert len(episode) >= 3
        assert episode.instruction == tasks(SUITE)[0].instruction
        for step, action in enumerate(episode.actions):
            assert np.round(action, 3).tolist() == pytest.approx(shown[init, step + 1][0])
            for view, pictures in episode.images.items():
                np.testing.assert_array_equal(pictures[step], shown[init, step][1][f"simulator/{view}"])
    assert not (tmp_path / "films").exists()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium")
def test_the_page_in_chromium(checkpoint: Path, tmp_path: Path):
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    port = free_port()
    server = launch(checkpoint, port, tmp_path)
    try:
        with api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            expect = api.expect
            expect.set_options(timeout=30_000)  # for machines that do other things too
            expect(page.locator("#age")).to_have_text("a real frame, tokenized")
            drawn = "document.getElementById('imagined-agentview').toDataURL()"
            before = page.evaluate(drawn)
            page.keyboard.down("d")
            expect(page.locator("#age")).to_have_text(re.compile(r"imagined for \d+ steps"))
            page.keyboard.up("d")
            assert page.evaluate(drawn) != before
            page.keyboard.press("v")
            expect(page.locator("#simulator")).to_be_visible()
            expect(page.locator("#psnr")).to_contain_text("front")
            page.keyboard.press("p")
            expect(page.locator("#driver")).to_have_text("policy")
            page.keyboard.press("t")
            expect(page.locator("#driver")).to_have_text("you")
            page.keyboard.press("Space")
            expect(page.locator("#gripper")).to_contain_text("gripper ")
            page.keyboard.press("b")
            page.select_option("#task", "2")
            expect(page.locator("#steps")).to_have_text("0")
            stop(server)
            expect(page.locator("#link")).to_have_text("connection lost, reconnecting")
            server = launch(checkpoint, port, tmp_path)
            expect(page.locator("#notice")).to_contain_text("Reconnected")
            expect(page.locator("#link")).to_have_text("connected")
            assert page.input_value("#task") == "2"
            page.set_viewport_size({"width": 390, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert not errors
            browser.close()
    finally:
        stop(server)
