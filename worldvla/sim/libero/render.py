"""LIBERO's steps and pictures with less computed, bit by bit and pixel by pixel (tests/test_libero.py)."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""View -> camera of LIBERO. Both pictures are turned by 180 degrees, as published policies saw them."""
DRAWN = ("xpos", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat")
DRAWN += ("cam_xpos", "cam_xmat", "light_xpos", "light_xdir")
"""Fields of MuJoCo's data that a picture is drawn from."""
HIDDEN_GROUP = 5
"""A group of geoms that MuJoCo does not draw."""
SIDES = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
"""Of a picture, outwards: x, y of the camera's frame, which looks along -z."""


@contextmanager
def lean_dynamics(sim: Any) -> Iterator[None]:
    """Within the block, a step of `sim`, robosuite's simulation, computes no forward dynamics twice.

    robosuite computes them three times a substep from one state: before the controller looks, as it looks,
    and in the step. What follows from positions and velocities alone is computed once here; the solver of
    contacts, which starts warm from where it was, runs as often as there.
    """
    import mujoco  # at the top of the file it could fail, before MUJOCO_GL is tried

    model, data, is_current = sim.model._model, sim.data._data, False

    def forward() -> None:
        nonlocal is_current
        done = mujoco.mjtStage.mjSTAGE_VEL if is_current else mujoco.mjtStage.mjSTAGE_NONE
        mujoco.mj_forwardSkip(model, data, int(done), 0)
        is_current = True

    def step() -> None:
        nonlocal is_current
        mujoco.mj_step2(model, data)
        is_current = False

    sim.forward, sim.step = forward, step  # of this simulation alone
    try:
        yield
    finally:
        del sim.forward, sim.step


class Cameras:
    """Draws a robosuite environment as it was at the substep at which its observations are sampled.

    That substep is not the last one of a step: a picture of the final data would be milliseconds off the
    published observation. A sensor keeps the data from there, and cameras are drawn whenever they are asked
    for. Made after the first reset, which compiles the model.
    """

    def __init__(self, world: Any) -> None:
        import mujoco

        observables = importlib.import_module("robosuite.utils.observables")
        self.sim = world.sim
        self.seen: Any = mujoco.MjData(world.sim.model._model)

        @observables.sensor(modality="snapshot")
        def copy_data(_cache: dict[str, Any]) -> np.ndarray:
            for name in DRAWN:
                getattr(self.seen, name)[:] = getattr(world.sim.data._data, name)
            return np.zeros(1)

        world.add_observable(observables.Observable("snapshot", copy_data, sampling_rate=world.control_freq))

    def picture(self, view: str, size: tuple[int, int]) -> np.ndarray:
        """Return one camera's uint8 (rows, columns, 3) at its own size, turned by 180 degrees."""
        context = self.sim._render_context_offscreen
        context.gl_ctx.make_current()  # robosuite never does: a second environment would draw into the first
        context.data = SimpleNamespace(_data=self.seen)
        groups = self.sim.model.geom_group
        before = groups.copy()
        groups[self.out_of_sight(view, size)] = HIDDEN_GROUP
        rows, columns = size
        picture = self.sim.render(width=columns, height=rows, camera_name=CAMERAS[view])
        groups[:] = before
        # OpenGL starts at the bottom; upright now, and mirrored as published
        return picture[::-1, ::-1].copy()

    def out_of_sight(self, view: str, size: tuple[int, int]) -> np.ndarray:
        """Return which geoms, bool (geoms,), have a box wholly beyond one side of the picture or behind the
        camera, and also of its image in each mirror that is seen: MuJoCo would draw them in vain.
        """
        model, seen = self.sim.model, self.seen
        camera = model.camera_name2id(CAMERAS[view])
        slope = np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        slopes = np.abs(SIDES) @ (slope * size[1] / size[0], slope)
        outwards = np.vstack([np.column_stack([SIDES, slopes]), (0.0, 0.0, 1.0)])
        outwards = outwards @ seen.cam_xmat[camera].reshape(3, 3).T
        eye, turned = seen.cam_xpos[camera], seen.geom_xmat.reshape(-1, 3, 3)
        middles = seen.geom_xpos + (turned @ model.geom_aabb[:, :3, None])[..., 0]

        def beyond(eye: np.ndarray, outwards: np.ndarray) -> np.ndarray:
            reach = np.abs(outwards @ turned) @ model.geom_aabb[:, 3:, None]
            return ((middles - eye) @ outwards.T - reach[..., 0] > 1e-3).any(axis=1)

        is_plane = model.geom_type == 0  # its box says nothing
        hidden = beyond(eye, outwards) & ~is_plane
        shines = (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        for mirror in np.flatnonzero(shines & ~hidden & (is_plane | (model.geom_type == 6))):
            up = turned[mirror, :, 2]
            top = seen.geom_xpos[mirror] + up * model.geom_size[mirror, 2] * (not is_plane[mirror])
            flip = np.eye(3) - 2 * np.outer(up, up)
            hidden &= beyond(top + flip @ (eye - top), outwards @ flip)
        return hidden
