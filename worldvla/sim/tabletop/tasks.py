"""The four tabletop suites as one declarative table: which things stand where, what is said, what must hold
at the end.

Coordinates are metres on the table: x to the right and y away in the agentview picture, z = 0 on the surface.
Every movable thing is jittered by up to `JITTER` an axis around its slot, every fixture by `FIXTURE_JITTER`,
as LIBERO varies its regions.
"""

from dataclasses import dataclass
from typing import Literal

from worldvla.sim.protocol import Task

JITTER = 0.03
FIXTURE_JITTER = 0.015
COLORS = {
    "red": (0.86, 0.16, 0.14),
    "blue": (0.13, 0.30, 0.85),
    "green": (0.12, 0.62, 0.25),
    "yellow": (0.96, 0.80, 0.12),
    "purple": (0.55, 0.20, 0.70),
    "orange": (0.97, 0.50, 0.10),
    "cyan": (0.10, 0.75, 0.80),
    "pink": (0.96, 0.50, 0.70),
    "white": (0.97, 0.97, 0.97),
    "brown": (0.45, 0.26, 0.12),
}
Place = tuple[float, float]


@dataclass(frozen=True)
class Goal:
    """A predicate on the simulator's state.

    in, on: `thing` rests in or on fixture `where`, not held. open, closed: the cabinet's drawer. pressed: the
    button has been pressed (it stays lit). push: `thing` lies in the zone.
    """

    verb: Literal["in", "on", "open", "closed", "pressed", "push"]
    thing: str = ""
    where: str = ""


@dataclass(frozen=True)
class Spec:
    """Everything that distinguishes one task. A thing's name is '<color> <shape>', with ' 2' after it for
    its look-alike."""

    instruction: str
    things: dict[str, Place]
    fixtures: dict[str, Place]
    goals: tuple[Goal, ...]
    drawer_open: bool = False


# Slots 13 cm apart in x and 12 cm in y: an open gripper fits between neighbours whatever the jitter.
A1, A2, A3, A4 = (-0.20, -0.12), (-0.07, -0.12), (0.07, -0.12), (0.20, -0.12)
B1, B2, B3, B4 = (-0.20, 0.00), (-0.07, 0.00), (0.07, 0.00), (0.20, 0.00)
C1, C2, C3, C4 = (-0.20, 0.12), (-0.07, 0.12), (0.07, 0.12), (0.20, 0.12)
CABINET = (-0.17, 0.17)
BASKET = (0.19, 0.0)


def _spatial() -> list[Spec]:
    """Two red cans that look alike; pairs of tasks share a scene, so that only the relation tells which is
    meant."""
    scenes: list[tuple[dict[str, Place], Place, tuple[str, str]]] = [
        (
            {"red can": B2, "blue cube": B3, "red can 2": B4, "yellow bottle": A1},
            C3,
            ("left of the blue cube", "right of the blue cube"),
        ),
        (
            {"red can": A3, "blue cube": B3, "red can 2": C3, "yellow bottle": A1},
            B4,
            ("in front of the blue cube", "behind the blue cube"),
        ),
        (
            {"red can": B1, "yellow bottle": A1, "red can 2": C4, "blue cube": A3},
            C3,
            ("next to the yellow bottle", "next to the plate"),
        ),
        (
            {"red can": B2, "red can 2": A4, "yellow bottle": B3, "blue cube": A1},
            C3,
            ("in the middle of the table", "in the front right corner"),
        ),
        (
            {"red can": A2, "red can 2": C3, "yellow bottle": A3, "blue cube": A1},
            B4,
            ("between the blue cube and the yellow bottle", "at the back of the table"),
        ),
    ]
    specs = []
    for things, plate, relations in scenes:
        fixtures = {"plate": plate, "cabinet": CABINET}
        for target, relation in zip(("red can", "red can 2"), relations, strict=True):
            text = f"pick up the red can {relation} and put it on the plate"
            specs.append(Spec(text, things, fixtures, (Goal("on", target, "plate"),)))
    return specs


def _object() -> list[Spec]:
    """Ten different things into the basket, each among three others."""
    names = ["red cube", "blue can", "green bottle", "yellow brick", "purple ball"]
    names += ["orange mug", "cyan cube", "pink can", "white pawn", "brown brick"]
    layouts = [(B2, A1, C2, A3), (A1, B2, C3, C1), (C2, A2, B1, A3), (A2, C1, A3, C2), (B1, A3, C2, A2)]
    specs = []
    for i, name in enumerate(names):
        others = [names[(i + step) % 10] for step in (3, 4, 7)]
        places = layouts[i % 5]
        if i >= 5:  # the second half mirrors the order of slots, so that a slot says nothing of the thing
            places = places[::-1]
        things = dict(zip([name, *others], places, strict=True))
        specs.append(
            Spec(f"put the {name} in the basket", things, {"basket": BASKET}, (Goal("in", name, "basket"),))
        )
    return specs


def _goal() -> list[Spec]:
    """One scene, ten goals."""
    things: dict[str, Place] = {"red cube": B2, "blue can": A1, "yellow brick": A3}
    fixtures: dict[str, Place] = {
        "plate": (0.01, 0.13),
        "basket": (0.18, 0.06),
        "cabinet": CABINET,
        "button": (-0.07, -0.13),
        "zone": (0.20, -0.12),
    }
    rows = [
        ("put the red cube on the plate", Goal("on", "red cube", "plate")),
        ("put the blue can on the plate", Goal("on", "blue can", "plate")),
        ("put the yellow brick on the plate", Goal("on", "yellow brick", "plate")),
        ("put the red cube in the basket", Goal("in", "red cube", "basket")),
        ("put the blue can in the basket", Goal("in", "blue can", "basket")),
        ("put the yellow brick in the basket", Goal("in", "yellow brick", "basket")),
        ("open the drawer", Goal("open")),
        ("press the button", Goal("pressed")),
        ("push the yellow brick into the white zone", Goal("push", "yellow brick", "zone")),
        ("put the blue can on top of the cabinet", Goal("on", "blue can", "cabinet")),
    ]
    return [Spec(text, things, fixtures, (goal,)) for text, goal in rows]


def _long() -> list[Spec]:
    """Two goals in a row."""
    specs = []
    for first, second in (
        ("red cube", "blue can"),
        ("green bottle", "yellow brick"),
        ("orange mug", "cyan cube"),
    ):
        things = {first: B2, second: A1, "purple ball" if first == "red cube" else "pink can": C2}
        goals = (Goal("in", first, "basket"), Goal("in", second, "basket"))
        text = f"put the {first} and the {second} in the basket"
        specs.append(Spec(text, things, {"basket": BASKET}, goals))
    fixtures: dict[str, Place] = {"plate": (0.05, 0.13), "basket": (0.18, -0.02)}
    for first, second in (("red cube", "blue can"), ("white pawn", "green bottle")):
        things = {first: A2, second: B1, "cyan cube": C2}
        goals = (Goal("on", first, "plate"), Goal("in", second, "basket"))
        text = f"put the {first} on the plate and the {second} in the basket"
        specs.append(Spec(text, things, fixtures, goals))
    fixtures = {"button": (-0.05, -0.03), "basket": BASKET}
    for thing, rest in (("blue can", "yellow brick"), ("orange mug", "red cube")):
        goals = (Goal("pressed"), Goal("in", thing, "basket"))
        text = f"press the button and put the {thing} in the basket"
        specs.append(Spec(text, {thing: A1, rest: C2}, fixtures, goals))
    scene: dict[str, Place] = {"red cube": A3, "green bottle": B3}
    fixtures = {"cabinet": CABINET, "plate": (0.19, 0.08), "button": (0.06, 0.14)}
    fill = (Goal("open"), Goal("in", "red cube", "cabinet"))
    shut = (Goal("on", "green bottle", "plate"), Goal("closed"))
    press = (Goal("pressed"), Goal("open"))
    return [
        *specs,
        Spec("open the drawer and put the red cube in it", scene, fixtures, fill),
        Spec("put the green bottle on the plate and close the drawer", scene, fixtures, shut, True),
        Spec("press the button and open the drawer", scene, fixtures, press),
    ]


SPECS: dict[str, list[Spec]] = {
    "tabletop_spatial": _spatial(),
    "tabletop_object": _object(),
    "tabletop_goal": _goal(),
    "tabletop_long": _long(),
}


def tasks(suite: str) -> tuple[Task, ...]:
    """Return the suite's ten tasks."""
    return tuple(
        Task(suite, index, spec.instruction.replace(" ", "_"), spec.instruction)
        for index, spec in enumerate(SPECS[suite])
    )
