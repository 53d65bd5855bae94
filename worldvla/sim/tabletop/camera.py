"""A camera without OpenGL: rays cast through MuJoCo, shaded with normals computed from each primitive's shape.

One directional light from above, so that the shadow below the gripper tells its height; soft lines on the table every 5 cm.
"""

import mujoco
import numpy as np

LIGHT = np.array([0.12, -0.20, 0.97]) / np.linalg.norm([0.12, -0.20, 0.97])
"""Direction towards the light, world frame."""
AMBIENT, DIFFUSE = 0.50, 0.50
BACKGROUND = (0.16, 0.18, 0.22)
GRID, GRID_WIDTH, GRID_DARKEN = 0.05, 0.006, 0.10
_PLANE, _SPHERE, _CAPSULE, _ELLIPSOID, _CYLINDER, _BOX = (
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}"))  # comparing arrays with the enum itself costs 10 ms a picture
    for name in ("PLANE", "SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "BOX")
)
_GEOMGROUP = np.array([1, 1, 1, 0, 0, 0], dtype=np.uint8)


class RayCamera:
    """Pictures from the MJCF camera called `camera`. Same state, same bytes."""

    def __init__(self, model: mujoco.MjModel, camera: str, rows: int, cols: int) -> None:
        self.model = model
        self.id = model.camera(camera).id
        self.rows, self.cols = rows, cols
        half = np.tan(np.deg2rad(model.cam_fovy[self.id]) / 2)
        y = (1 - (2 * np.arange(rows) + 1) / rows) * half
        x = ((2 * np.arange(cols) + 1) / cols - 1) * half * cols / rows
        rays = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.full((rows, cols), -1.0)], axis=-1).reshape(-1, 3)
        self._rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        table = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "table")
        self._table = table if table >= 0 else None

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """Return uint8 (rows, cols, 3)."""
        model = self.model
        rays = self._rays @ data.cam_xmat[self.id].reshape(3, 3).T
        geom, distance = self._cast(data, data.cam_xpos[self.id], rays)
        hit = np.flatnonzero(geom >= 0)
        color = np.empty((len(rays), 3))
        color[:] = BACKGROUND
        if len(hit):
            ids = geom[hit]
            points = data.cam_xpos[self.id] + rays[hit] * distance[hit, None]
            normals = self._normals(data, ids, points)
            albedo = model.geom_rgba[ids, :3].astype(np.float64)
            if self._table is not None:
                on = np.flatnonzero(ids == self._table)
                footprint = distance[hit[on]] * (self._rays[0, 1] * 2 / self.rows)
                albedo[on] *= 1.0 - GRID_DARKEN * self._grid(points[on], footprint)[:, None]
            facing = np.clip(normals @ LIGHT, 0.0, 1.0)
            lit = np.flatnonzero(facing > 0)
            shade = np.zeros(len(hit))
            shade[lit] = facing[lit] * ~self._shadowed(data, points[lit] + normals[lit] * 1e-4)
            color[hit] = albedo * (AMBIENT + DIFFUSE * shade)[:, None]
        return np.clip(color * 255 + 0.5, 0, 255).astype(np.uint8).reshape(self.rows, self.cols, 3)

    def _cast(self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        geom = np.empty(len(rays), dtype=np.int32)
        distance = np.empty(len(rays))
        mujoco.mj_multiRay(
            self.model, data, origin, np.ascontiguousarray(rays).ravel(), _GEOMGROUP, 1, -1, geom, distance, len(rays), 10.0
        )
        return geom, distance

    def _shadowed(self, data: mujoco.MjData, points: np.ndarray) -> np.ndarray:
        """Return whether something stands between each point and the light. Rays start at a far point on the light's plane.

        `mj_multiRay` casts from one origin, so the light is a distant point: rays go from it to the points.
        """
        origin = LIGHT * 6.0
        way = points - origin
        reach = np.linalg.norm(way, axis=1)
        _, distance = self._cast(data, origin, way / reach[:, None])
        return (distance >= 0) & (distance < reach - 1e-3)

    def _grid(self, points: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Return the share, 0 to 1, of each table pixel covered by lines, smoothed over the pixel's size."""
        width = np.maximum(footprint, GRID_WIDTH)[:, None]
        offset = np.abs((points[:, :2] + GRID / 2) % GRID - GRID / 2)
        cover = np.clip(1.0 - offset / width, 0.0, 1.0) * (GRID_WIDTH / width)
        return cover.max(axis=1)

    def _normals(self, data: mujoco.MjData, ids: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Return outward unit normals (n, 3), world frame, from each geom's shape."""
        model = self.model
        frames = data.geom_xmat[ids].reshape(-1, 3, 3)
        local = np.einsum("nji,nj->ni", frames, points - data.geom_xpos[ids])
        size, kind = model.geom_size[ids], model.geom_type[ids]
        out = np.zeros_like(local)
        box = kind == _BOX
        if box.any():
            face = np.argmax(np.abs(local[box]) - size[box], axis=1)
            row = np.flatnonzero(box)
            out[row, face] = np.sign(local[row, face])
        ball = kind == _SPHERE
        out[ball] = local[ball]
        egg = kind == _ELLIPSOID
        out[egg] = local[egg] / np.maximum(size[egg], 1e-9) ** 2
        plane = kind == _PLANE
        out[plane] = (0, 0, 1)
        pipe = kind == _CAPSULE
        out[pipe] = local[pipe]
        out[pipe, 2] -= np.clip(local[pipe, 2], -size[pipe, 1], size[pipe, 1])
        tin = kind == _CYLINDER
        if tin.any():
            row = np.flatnonzero(tin)
            radial = np.hypot(local[row, 0], local[row, 1]) - size[row, 0]
            cap = np.abs(local[row, 2]) - size[row, 1] > radial
            out[row, :2] = np.where(cap[:, None], 0.0, local[row, :2])
            out[row, 2] = np.where(cap, np.sign(local[row, 2]), 0.0)
        out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        return np.einsum("nij,nj->ni", frames, out)
