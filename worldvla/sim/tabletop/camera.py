"""A camera without OpenGL: rays cast through MuJoCo, shaded with normals from each primitive's shape.

    picture = RayCamera(model, "agentview", 64, 64).render(data)

One directional light from nearly straight above, so that the shadow below the gripper tells its height;
soft lines on the table every 5 cm. Geom groups 0 to 2 are seen and throw shadows; groups 3 to 5 and geoms
with alpha 0 do neither. Every other geom is opaque. Meshes and height fields get no normal and look flat.
"""

import mujoco
import numpy as np

LIGHT = np.array([0.12, -0.20, 0.97]) / np.linalg.norm([0.12, -0.20, 0.97])
"""Direction towards the light, world frame."""
AMBIENT, DIFFUSE = 0.50, 0.50
"""Brightness of a point in shadow, and what full light adds to it."""
BACKGROUND = (0.16, 0.18, 0.22)
GRID, GRID_WIDTH, GRID_DARKEN = 0.05, 0.006, 0.10
"""Lines on the geom called `table`: spacing (m), half width (m), share of the light that they take."""
REACH = 10.0
"""Length of the longest ray, metres."""
LIGHT_DISTANCE = 6.0
"""Metres from the origin to the point from which shadows are cast; `mj_multiRay` casts from one point."""
LIFT = 1e-4
"""Metres by which a point leaves its surface before it is tested for shadow."""
_PLANE, _SPHERE, _CAPSULE, _ELLIPSOID, _CYLINDER, _BOX = (  # comparing with the enum costs 10 ms a picture
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}"))
    for name in ("PLANE", "SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "BOX")
)
_GEOMGROUP = np.array([1, 1, 1, 0, 0, 0], dtype=np.uint8)


class RayCamera:
    """Pictures of `rows` x `cols` pixels from the MJCF camera called `camera`. Same state, same bytes."""

    def __init__(self, model: mujoco.MjModel, camera: str, rows: int, cols: int) -> None:
        if rows < 1 or cols < 1:
            raise ValueError(f"camera {camera}: a picture needs at least 1 x 1 pixels, got {rows} x {cols}")
        self.model = model
        self.id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if self.id < 0:
            names = [model.camera(i).name for i in range(model.ncam)]
            raise ValueError(f"the model has no camera {camera!r}, it has {names}")
        self.rows, self.cols = rows, cols
        half = np.tan(np.deg2rad(model.cam_fovy[self.id]) / 2)
        y = (1 - (2 * np.arange(rows) + 1) / rows) * half
        x = ((2 * np.arange(cols) + 1) / cols - 1) * half * cols / rows
        depth = np.full((rows, cols), -1.0)  # a MuJoCo camera looks along its own -z
        rays = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), depth], axis=-1).reshape(-1, 3)
        self._rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        self._pixel = float(self._rays[0, 1]) * 2 / rows  # width of a pixel over its distance, about
        self._table = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "table")  # -1: none

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """Return uint8 (rows, cols, 3), row 0 at the top. `data` must be up to date (after `mj_forward`)."""
        eye = data.cam_xpos[self.id]
        rays = self._rays @ data.cam_xmat[self.id].reshape(3, 3).T
        geom, distance = self._cast(data, eye, rays)
        color = np.empty((len(rays), 3))
        color[:] = BACKGROUND
        hit = np.flatnonzero(geom >= 0)
        if len(hit):
            ids, distance = geom[hit], distance[hit]
            points = eye + rays[hit] * distance[:, None]
            albedo = self.model.geom_rgba[ids, :3].astype(np.float64)
            on = np.flatnonzero(ids == self._table)
            albedo[on] *= 1.0 - GRID_DARKEN * grid_cover(points[on, :2], distance[on] * self._pixel)[:, None]
            color[hit] = albedo * self._light(data, ids, points)[:, None]
        return np.clip(color * 255 + 0.5, 0, 255).astype(np.uint8).reshape(self.rows, self.cols, 3)

    def _cast(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first geom on each ray (-1: none) and its distance in metres."""
        geom = np.empty(len(rays), dtype=np.int32)
        distance = np.empty(len(rays))
        flat = np.ascontiguousarray(rays).ravel()
        mujoco.mj_multiRay(
            self.model, data, origin, flat, _GEOMGROUP, 1, -1, geom, distance, len(rays), REACH
        )
        return geom, distance

    def _light(self, data: mujoco.MjData, ids: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Return the brightness (n,) of points on geoms `ids`, in AMBIENT to AMBIENT + DIFFUSE."""
        normals = surface_normals(self.model, data, ids, points)
        facing = np.clip(normals @ LIGHT, 0.0, 1.0)
        lit = np.flatnonzero(facing > 0)
        shade = np.zeros(len(ids))
        shade[lit] = facing[lit] * ~self._shadowed(data, points[lit] + normals[lit] * LIFT)
        return AMBIENT + DIFFUSE * shade

    def _shadowed(self, data: mujoco.MjData, points: np.ndarray) -> np.ndarray:
        """Return whether something stands between each point and the light."""
        origin = LIGHT * LIGHT_DISTANCE
        way = points - origin
        reach = np.linalg.norm(way, axis=1)
        _, distance = self._cast(data, origin, way / reach[:, None])
        return (distance >= 0) & (distance < reach - 1e-3)


def grid_cover(points: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Return the share, 0 to 1, of lines in the table pixels around `points` (n, 2), `pixel` (n,) m wide."""
    width = np.maximum(pixel, GRID_WIDTH)[:, None]
    offset = np.abs(points - GRID * np.rint(points / GRID))
    cover = np.clip(1.0 - offset / width, 0.0, 1.0) * (GRID_WIDTH / width)
    return np.maximum(cover[:, 0], cover[:, 1])


def surface_normals(
    model: mujoco.MjModel, data: mujoco.MjData, ids: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Return outward unit normals (n, 3), world frame, of geoms `ids` (n,) at surface `points` (n, 3).

    `mj_multiRay` of MuJoCo 3.3.2 gives none. Zero for geoms that are no primitives.
    """
    kind = model.geom_type[ids]
    out = np.empty(points.shape)
    plane = np.flatnonzero(kind == _PLANE)
    out[plane] = data.geom_xmat[ids[plane]][:, 2::3]  # a plane's z axis, and most of a picture
    rest = np.flatnonzero(kind != _PLANE)
    if len(rest):
        ids, kind = ids[rest], kind[rest]
        frames = data.geom_xmat[ids].reshape(-1, 3, 3)
        local = np.einsum("nji,nj->ni", frames, points[rest] - data.geom_xpos[ids])
        normal = _local_normals(kind, model.geom_size[ids], local)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        out[rest] = np.einsum("nij,nj->ni", frames, normal)
    return out


def _local_normals(kind: np.ndarray, size: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Return normals of any length, in the geom's frame, at points `local` (n, 3) in that frame."""
    out = np.zeros_like(local)
    row = np.flatnonzero(kind == _BOX)
    face = np.argmax(np.abs(local[row]) - size[row], axis=1)
    out[row, face] = np.sign(local[row, face])
    row = np.flatnonzero(kind == _SPHERE)
    out[row] = local[row]
    row = np.flatnonzero(kind == _ELLIPSOID)
    out[row] = local[row] / size[row] ** 2
    row = np.flatnonzero(kind == _CAPSULE)  # from the nearest point of the axis
    out[row] = local[row]
    out[row, 2] -= np.clip(local[row, 2], -size[row, 1], size[row, 1])
    row = np.flatnonzero(kind == _CYLINDER)
    x, y, z = local[row].T
    cap = np.abs(z) - size[row, 1] > np.hypot(x, y) - size[row, 0]
    out[row, 0] = np.where(cap, 0.0, x)
    out[row, 1] = np.where(cap, 0.0, y)
    out[row, 2] = np.where(cap, np.sign(z), 0.0)
    return out
