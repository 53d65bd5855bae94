"""Build the MuJoCo model of one task from primitive geoms: table, floating gripper, things, fixtures, two cameras.

No mesh, no texture, no OpenGL. Geom group 0 is seen by the cameras, group 3 is not. Fixtures are mocap bodies, so that their
jittered places are part of the simulator's state.
"""

import mujoco
import numpy as np

from worldvla.sim.tabletop.tasks import COLORS, Spec

TIMESTEP = 0.004
SUBSTEPS = 20
"""Physics steps of one action: 80 ms, 12.5 Hz."""
FINGER_OPEN = 0.045
"""Half of the opening, metres; the opened gripper is 9 cm wide inside."""
LOW = (-0.26, -0.20, 0.022)
HIGH = (0.26, 0.23, 0.32)
"""Bounds of the end-effector's commanded position, metres."""
HOME = (0.0, -0.02, 0.20)
PLATE_RADIUS = 0.06
BASKET_HALF, BASKET_WALL, BASKET_HEIGHT = (0.062, 0.082), 0.005, 0.045
ZONE_HALF = 0.062
CABINET_HALF = (0.065, 0.06, 0.042)
DRAWER_TRAVEL = 0.10
BUTTON_TRAVEL = 0.012

# shape -> (geoms, half height in metres, grasp height above the body's origin). The origin is half a height above the table.
SHAPES: dict[str, tuple[str, float, float]] = {
    "cube": ('<geom type="box" size=".025 .025 .025" {c}/>', 0.025, 0.004),
    "brick": ('<geom type="box" size=".022 .036 .02" {c}/>', 0.02, 0.005),
    "can": ('<geom type="cylinder" size=".026 .03" {c}/>', 0.03, 0.004),
    "bottle": (
        '<geom type="cylinder" size=".024 .028" pos="0 0 -.012" {c}/><geom type="cylinder" size=".012 .009" pos="0 0 .025" {c}/>',
        0.04,
        -0.008,
    ),
    "ball": ('<geom type="sphere" size=".028" condim="6" friction="1.5 .02 .004" {c}/>', 0.028, 0.0),
    "mug": (
        '<geom type="cylinder" size=".026 .026" {c}/><geom type="box" size=".006 .012 .016" pos="0 -.036 0" {c}/>',
        0.026,
        0.004,
    ),
    "pawn": (
        '<geom type="cylinder" size=".026 .018" pos="0 0 -.016" {c}/><geom type="sphere" size=".02" pos="0 0 .014" {c}/>',
        0.034,
        -0.010,
    ),
}


def shape(thing: str) -> str:
    """Return the shape word of a thing's name ('red can 2' -> 'can')."""
    return thing.split()[1]


def grasp_offset(thing: str) -> float:
    """Return the height, metres above the thing's origin, at which the fingertips should close."""
    return SHAPES[shape(thing)][2]


def half_height(thing: str) -> float:
    return SHAPES[shape(thing)][1]


def _rgba(color: tuple[float, float, float]) -> str:
    return f'rgba="{color[0]} {color[1]} {color[2]} 1"'


def _camera(
    name: str, pos: tuple[float, float, float], target: tuple[float, float, float], fovy: float
) -> str:
    """Return a <camera> at `pos` that looks at `target`, not straight down, its picture's up towards z."""
    z = np.subtract(pos, target)  # a MuJoCo camera looks along its own -z
    x = np.cross((0.0, 0.0, 1.0), z)
    x /= np.linalg.norm(x)
    y = np.cross(z / np.linalg.norm(z), x)
    axes = " ".join(f"{v:.6f}" for v in (*x, *y))
    return f'<camera name="{name}" pos="{pos[0]} {pos[1]} {pos[2]}" xyaxes="{axes}" fovy="{fovy}"/>'


def _gripper() -> str:
    """A floating parallel-jaw hand: three slides, three hinges, two fingers that close along x. Its site is between the tips."""
    finger = ""
    for side, sign in (("left", 1), ("right", -1)):
        finger += f"""
        <body name="{side}_finger" pos="{sign * 0.008} 0 0">
          <joint name="{side}_finger" type="slide" axis="{sign} 0 0" range="0 {FINGER_OPEN}" damping="6" armature="0.02"/>
          <geom name="{side}_tip" type="box" size=".008 .013 .034" pos="0 0 .014" mass=".05" rgba=".20 .20 .23 1"
                friction="1.6 .02 .002" solref="0.006 1" condim="4"/>
        </body>"""
    return f"""
    <body name="hand" pos="0 0 0" gravcomp="1">
      <joint name="hand_x" type="slide" axis="1 0 0" armature=".3"/>
      <joint name="hand_y" type="slide" axis="0 1 0" armature=".3"/>
      <joint name="hand_z" type="slide" axis="0 0 1" armature=".3"/>
      <joint name="hand_yaw" type="hinge" axis="0 0 1" armature=".01"/>
      <joint name="hand_pitch" type="hinge" axis="0 1 0" armature=".01"/>
      <joint name="hand_roll" type="hinge" axis="1 0 0" armature=".01"/>
      <site name="grip" pos="0 0 0"/>
      <geom name="palm" type="box" size=".062 .020 .012" pos="0 0 .060" mass=".3" rgba=".42 .44 .48 1"/>
      <geom name="arm" type="cylinder" size=".018 .02" pos="0 0 .092" mass=".1" rgba=".30 .32 .36 1" contype="0" conaffinity="0"/>
      {_camera("wrist", (0.0, -0.075, 0.055), (0.0, 0.004, -0.03), 78)}{finger}
    </body>"""


def _fixture(name: str) -> str:
    (bx, by), w, h = BASKET_HALF, BASKET_WALL, BASKET_HEIGHT
    cx, cy, cz = CABINET_HALF
    if name == "plate":
        geoms = f"""<geom type="cylinder" size="{PLATE_RADIUS} .003" pos="0 0 .003" rgba=".93 .93 .90 1"/>
          <geom type="cylinder" size="{PLATE_RADIUS * 0.62} .0034" pos="0 0 .0034" rgba=".55 .68 .86 1"/>"""
    elif name == "basket":
        wall = 'rgba=".72 .52 .30 1"'
        geoms = f'<geom type="box" size="{bx} {by} .003" pos="0 0 .003" rgba=".50 .35 .20 1"/>'
        for x, y, sx, sy in ((bx, 0, w, by), (-bx, 0, w, by), (0, by, bx, w), (0, -by, bx, w)):
            geoms += f'<geom type="box" size="{sx} {sy} {h / 2}" pos="{x} {y} {h / 2}" {wall}/>'
    elif name == "cabinet":
        wood, face = 'rgba=".45 .50 .42 1"', 'rgba=".62 .68 .56 1"'
        geoms = f"""<geom type="box" size="{cx} {cy} .004" pos="0 0 {2 * cz - 0.004}" {wood}/>
          <geom type="box" size=".004 {cy} {cz}" pos="{cx - 0.004} 0 {cz}" {wood}/>
          <geom type="box" size=".004 {cy} {cz}" pos="{-cx + 0.004} 0 {cz}" {wood}/>
          <geom type="box" size="{cx} .004 {cz}" pos="0 {cy - 0.004} {cz}" {wood}/>
          <body name="drawer" pos="0 0 .004" gravcomp="1">
            <joint name="drawer" type="slide" axis="0 -1 0" range="0 {DRAWER_TRAVEL + 0.005}" damping="8" frictionloss="1.2" limited="true"/>
            <geom type="box" size="{cx - 0.011} {cy - 0.008} .003" pos="0 -.004 .006" mass=".1" {face}/>
            <geom name="drawer_front" type="box" size="{cx - 0.002} .004 {cz - 0.007}" pos="0 {-cy - 0.003} {cz - 0.005}" mass=".1" {face}/>
            <geom type="box" size=".003 {cy - 0.008} .018" pos="{cx - 0.014} -.004 .020" mass=".03" {face}/>
            <geom type="box" size=".003 {cy - 0.008} .018" pos="{-cx + 0.014} -.004 .020" mass=".03" {face}/>
            <geom type="box" size="{cx - 0.014} .003 .018" pos="0 {cy - 0.014} .020" mass=".03" {face}/>
            <geom name="handle_bar" type="box" size=".007 .018 .007" pos="0 {-cy - 0.022} {cz - 0.002}" mass=".02" rgba=".9 .2 .5 1"/>
            <geom name="handle" type="box" size=".012 .012 .028" pos="0 {-cy - 0.040} {cz - 0.002}" mass=".05" friction="1.5 .02 .002" rgba=".9 .2 .5 1"/>
          </body>"""
    elif name == "button":
        geoms = f"""<geom type="cylinder" size=".034 .010" pos="0 0 .010" rgba=".25 .26 .30 1"/>
          <body name="button_cap" pos="0 0 .034" gravcomp="1">
            <joint name="button" type="slide" axis="0 0 -1" range="0 {BUTTON_TRAVEL + 0.002}" stiffness="120" damping="4" limited="true"/>
            <geom name="button_cap" type="cylinder" size=".026 .012" mass=".05" rgba=".80 .10 .30 1"/>
          </body>"""
    elif name == "zone":
        geoms = f'<geom type="box" size="{ZONE_HALF} {ZONE_HALF} .0006" pos="0 0 .0002" contype="0" conaffinity="0" rgba=".97 .97 .97 1"/>'
    else:
        raise ValueError(f"unknown fixture {name!r}")
    return f'<body name="{name}" mocap="true" pos="0 0 0">{geoms}</body>'


def build(spec: Spec) -> mujoco.MjModel:
    """Compile the model of `spec`; places are set by the environment's reset."""
    things = ""
    for name in spec.things:
        geoms, height, _ = SHAPES[shape(name)]
        surface = "" if "friction" in geoms else ' friction="1.2 .02 .002" condim="4" solref="0.006 1"'
        body = geoms.format(c=_rgba(COLORS[name.split()[0]]) + ' density="250"' + surface)
        things += f'<body name="{name}" pos="0 0 {height}"><freejoint name="{name}"/>{body}</body>'
    fixtures = "".join(_fixture(name) for name in spec.fixtures)
    servo = "".join(
        f'<position joint="hand_{axis}" kp="{kp}" kv="{kv}" forcerange="-{force} {force}"/>'
        for axis, kp, kv, force in (
            ("x", 1500, 60, 60),
            ("y", 1500, 60, 60),
            ("z", 1500, 60, 60),
            ("yaw", 40, 1.6, 4),
            ("pitch", 60, 2.0, 6),
            ("roll", 60, 2.0, 6),
        )
    )
    fingers = "".join(
        f'<position joint="{side}_finger" kp="400" kv="12" forcerange="-8 8" ctrlrange="-.02 {FINGER_OPEN}"/>'
        for side in ("left", "right")
    )
    return mujoco.MjModel.from_xml_string(f"""
<mujoco model="tabletop">
  <compiler autolimits="true"/>
  <option timestep="{TIMESTEP}" cone="elliptic" impratio="10" integrator="implicitfast"/>
  <size nuserdata="1"/>
  <worldbody>
    <geom name="table" type="plane" size=".42 .36 .05" pos="0 0 0" rgba=".80 .74 .66 1" friction="1 .02 .002"/>
    {_camera("agentview", (0.0, -0.42, 0.62), (0.0, 0.030, 0.0), 41)}
    {_gripper()}{fixtures}{things}
  </worldbody>
  <contact>
    <exclude body1="hand" body2="left_finger"/><exclude body1="hand" body2="right_finger"/>
    <exclude body1="left_finger" body2="right_finger"/>
    {'<exclude body1="cabinet" body2="drawer"/>' if "cabinet" in spec.fixtures else ""}
    {'<exclude body1="button" body2="button_cap"/>' if "button" in spec.fixtures else ""}
  </contact>
  <actuator>{servo}{fingers}</actuator>
</mujoco>""")
