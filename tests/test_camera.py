"""The ray-cast camera: hits against MuJoCo's single rays, normals against finite differences, what is seen.

Run: pytest tests/test_camera.py
"""

from typing import Any

import mujoco
import numpy as np
import pytest

from worldvla.sim.tabletop import camera as cam

SIZES = {
    "sphere": ".05",
    "box": ".05 .03 .04",
    "cylinder": ".04 .05",
    "capsule": ".03 .04",
    "ellipsoid": ".05 .03 .04",
}
ABOVE = '<camera name="eye" pos="0 0 .6" fovy="40"/>'  # looks straight down, picture's up = +y


def _scene(body: str) -> tuple[Any, Any]:
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{body}</worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def _render(body: str, rows: int = 33, cols: int = 33) -> np.ndarray:
    model, data = _scene(body)
    return cam.RayCamera(model, "eye", rows, cols).render(data)


@pytest.mark.parametrize("shape", [*SIZES, "plane"])
def test_normals_match_finite_differences(shape):
    """Rays beside a hit find the surface's tangents; their cross product is the normal."""
    size = SIZES.get(shape, ".3 .3 .1")
    geom = f'<geom type="{shape}" size="{size}" pos=".02 -.01 .1" euler="25 -35 50" rgba="1 1 1 1"/>'
    model, data = _scene(geom)
    eye, step = np.array([0.05, 0.1, 0.7]), 1e-5
    rng = np.random.default_rng(0)
    checked = 0
    for target in data.geom_xpos[0] + rng.uniform(-0.05, 0.05, (60, 3)):
        ray = (target - eye) / np.linalg.norm(target - eye)
        side = np.cross(ray, [1.0, 0.0, 0.0])
        up = np.cross(side, ray)
        points, faces = [], []
        for offset in (0 * side, step * side, step * up):
            geom_id = np.array([-1], dtype=np.int32)
            way = (ray + offset) / np.linalg.norm(ray + offset)
            distance = mujoco.mj_ray(model, data, eye, way, None, 1, -1, geom_id)
            points.append(eye + way * distance if distance >= 0 else None)
            if distance >= 0:
                faces.append(cam.surface_normals(model, data, geom_id, points[-1][None])[0])
        if len(faces) < 3 or min(faces[0] @ faces[1], faces[0] @ faces[2]) < 0.99 or -faces[0] @ ray < 0.2:
            continue  # a miss, an edge between the rays, or a grazing ray
        expected = np.cross(points[1] - points[0], points[2] - points[0])
        expected /= np.linalg.norm(expected)
        expected *= -np.sign(expected @ ray)  # outward: against the ray
        assert faces[0] @ expected > 1 - 1e-5, (shape, faces[0], expected)
        checked += 1
    assert checked > 20


def test_every_pixel_hits_what_a_single_ray_hits():
    """`mj_multiRay` skips geoms by bounding angles, `mj_ray` does not: both must see the same."""
    geoms = "".join(
        f'<geom type="{shape}" size="{size}" pos="{0.12 * (i % 3) - 0.1} {0.14 * (i // 3) - 0.07} .05"/>'
        for i, (shape, size) in enumerate(SIZES.items())
    )
    eye = '<camera name="eye" pos="0 -.4 .4" xyaxes="1 0 0 0 .7 .7" fovy="50"/>'
    model, data = _scene(f'<geom type="plane" size=".2 .2 .1"/>{geoms}{eye}')
    camera = cam.RayCamera(model, "eye", 24, 40)
    rays = camera._rays @ data.cam_xmat[0].reshape(3, 3).T
    geom, distance = camera._cast(data, data.cam_xpos[0], rays)
    one = np.array([-1], dtype=np.int32)
    for i, ray in enumerate(rays):
        expected = mujoco.mj_ray(model, data, data.cam_xpos[0], ray, None, 1, -1, one)
        assert (geom[i], distance[i]) == pytest.approx((one[0], expected))
    assert set(geom) == {-1, 0, 1, 2, 3, 4, 5}


def test_picture_is_upright_and_not_mirrored():
    """Right of the camera is right in the picture, its up is row 0, and pixels are square."""
    right = '<geom type="sphere" size=".03" pos=".1 0 0" rgba="1 0 0 1"/>'
    top = '<geom type="sphere" size=".03" pos="0 .1 0" rgba="0 1 0 1"/>'
    picture = _render(right + top + ABOVE, 40, 60).astype(int)
    red = np.argwhere(picture[..., 0] > picture[..., 2] + 60).mean(axis=0)
    green = np.argwhere(picture[..., 1] > picture[..., 2] + 60).mean(axis=0)
    pixels = 0.1 / 0.6 / np.tan(np.deg2rad(20)) * 20  # 10 cm at 60 cm, in pixels
    np.testing.assert_allclose(red, (19.5, 29.5 + pixels), atol=0.7)
    np.testing.assert_allclose(green, (19.5 - pixels, 29.5), atol=0.7)


@pytest.mark.parametrize("hidden", ['rgba="1 0 0 0"', 'rgba="1 0 0 1" group="3"'])
def test_hidden_geoms_are_not_seen_and_throw_no_shadow(hidden):
    table = '<geom name="table" type="plane" size="1 1 .1" rgba=".8 .8 .8 1"/>'
    ball = f'<geom type="sphere" size=".05" pos="0 0 .2" {hidden}/>'
    np.testing.assert_array_equal(_render(table + ball + ABOVE), _render(table + ABOVE))


def test_misses_show_the_background():
    picture = _render(ABOVE)
    assert np.all(picture == np.round(np.array(cam.BACKGROUND) * 255))


def test_light_and_shadow_levels():
    """A level plane shows rgba x (ambient + diffuse x cosine); below a ball, ambient alone."""
    plane = '<geom type="plane" size="1 1 .1" rgba=".8 .6 .4 1"/>'
    ball = '<geom type="sphere" size=".04" pos="0 0 {z}"/>'
    base = np.array([0.8, 0.6, 0.4]) * 255
    open_ground = _render(plane + ABOVE)[16, 16]
    np.testing.assert_allclose(open_ground, base * (cam.AMBIENT + cam.DIFFUSE * cam.LIGHT[2]), atol=1)
    side = '<camera name="eye" pos="0 -.5 .1" xyaxes="1 0 0 0 .2 1" fovy="60"/>'
    dark = (base * cam.AMBIENT).round()
    spots = []
    for z in (0.1, 0.3):
        picture = _render(plane + ball.format(z=z) + side, 96, 96).astype(float)
        shaded = np.argwhere(np.abs(picture - dark).max(axis=-1) <= 1)
        assert len(shaded) > 5
        spots.append(shaded.mean(axis=0))
    assert np.linalg.norm(spots[0] - spots[1]) > 3  # the shadow moves with height


def test_table_lines_are_five_centimetres_apart_and_average_out_far_away():
    line = np.array([[0.05, 0.02], [0.02, -0.10]])
    np.testing.assert_allclose(cam.grid_cover(line, np.full(2, 1e-3)), 1.0, atol=1e-9)
    np.testing.assert_allclose(cam.grid_cover(np.full((1, 2), 0.025), np.full(1, 1e-3)), 0.0)
    across = np.stack([np.linspace(0, 0.05, 1001)[:-1], np.full(1000, 0.025)], axis=1)
    for pixel in (1e-3, 6e-3, 0.012, 0.025):  # the mean does not depend on the pixel's size: no shimmer
        assert cam.grid_cover(across, np.full(1000, pixel)).mean() == pytest.approx(0.12, abs=2e-3)


def test_same_state_gives_the_same_bytes():
    body = (
        '<geom name="table" type="plane" size="1 1 .1"/><geom type="capsule" size=".03 .04" pos="0 0 .1"/>'
        + ABOVE
    )
    model, data = _scene(body)
    first = cam.RayCamera(model, "eye", 32, 32)
    picture = first.render(data)
    assert picture.dtype == np.uint8
    assert picture.shape == (32, 32, 3)
    np.testing.assert_array_equal(picture, first.render(data))
    np.testing.assert_array_equal(picture, cam.RayCamera(model, "eye", 32, 32).render(data))


def test_camera_on_a_body_moves_with_it():
    ground = '<geom type="plane" size="1 1 .1" rgba="0 1 0 1"/>'
    ground += '<geom type="box" size=".05 .05 .02" pos=".3 0 0" rgba="1 0 0 1"/>'
    hand = f'<joint type="slide" axis="1 0 0"/><geom type="sphere" size=".01" group="3"/>{ABOVE}'
    model, data = _scene(f'{ground}<body pos="0 0 .3">{hand}</body>')
    camera = cam.RayCamera(model, "eye", 32, 32)
    for x, column in ((0.2, 20.4), (0.3, 15.5)):  # a pixel is 2.05 cm at the table's distance
        data.qpos[0] = x
        mujoco.mj_forward(model, data)
        red = np.argwhere(camera.render(data)[..., 0] > 100)
        np.testing.assert_allclose(red.mean(axis=0), (15.5, column), atol=0.7)


def test_bad_cameras_are_named():
    model, _ = _scene(ABOVE)
    with pytest.raises(ValueError, match=r"no camera 'front', it has \['eye'\]"):
        cam.RayCamera(model, "front", 8, 8)
    with pytest.raises(ValueError, match="at least 1 x 1 pixels, got 0 x 8"):
        cam.RayCamera(model, "eye", 0, 8)
