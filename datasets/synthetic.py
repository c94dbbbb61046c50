"""The synthetic data set: small street scenes, painted by NumPy from (seed, split, index) alone, without any files.

    scene = paint(seed=0, split="train", index=7, size=64)      # rgb, depth, event, lidar, label

Not in the paper: it stands in for DELIVER (Zhang et al. 2023), whose four modalities, five weather conditions and
five sensor failures it copies. A scene is laid out in metres in front of a pinhole camera and painted far to near, so
that its modalities agree with each other. By construction none of them tells all classes apart:

    by colour only      LaneMark | Road, hedge (Vegetation) | low wall (Building)
    by distance only    Sidewalk | Road (the same greys, one is raised), Billboard (a flat painted car) | a real car
    by motion only      MovingCar | ParkedCar (the same in rgb, depth and lidar; only events see the difference)

A condition or a failure changes a modality, never the scene: label and geometry depend on (seed, split, index) alone.
Axes: u right and v down, 0..1 over the image (which is stretched to its size); x right and z forward, in metres.
The focal length is one image width, so a thing of width x at distance z covers x / z of the image.
"""

from dataclasses import make_dataclass
from types import SimpleNamespace

import numpy as np

# The order of classes/synthetic.txt.
SKY, BUILDING, VEGETATION, ROAD, LANE, SIDEWALK, POLE, SIGN, BILLBOARD, PARKED, MOVING, PEDESTRIAN = range(12)
SPLITS = ("train", "val", "test")
CONDITIONS = ("cloud", "fog", "night", "rain", "sun")
CASES = ("motionblur", "overexposure", "underexposure", "lidarjitter", "eventlowres")

FAR = 70.0  # metres; only the skyline is there
TEXELS = 64  # texture and scan lines are as fine as this at every image size
REFLECTANCE = np.array([0, 0.45, 0.45, 0.25, 0.25, 0.25, 0.4, 0.95, 0.5, 0.5, 0.5, 0.5], np.float32)  # by class
ROUGHNESS = np.array([0.02, 0.06, 0.2, 0.08, 0.06, 0.08, 0.05, 0.03, 0.05, 0.05, 0.05, 0.08], np.float32)

# The background's surfaces by number; behind DASHED come BLOCKS blocks of the skyline and 2 * HOUSES house fronts.
VOID, ASPHALT, MARK, PAVEMENT, GRASS, DASHED, BLOCKS, HOUSES = 0, 1, 2, 3, 4, 5, 8, 8
FRONT = DASHED + 1 + BLOCKS

# What stands on the street is made of parts, painted in order: shape; left, right, bottom, top as shares of the
# thing's box; surface angle as in HHA, upright to facing up; tint: a colour, or a factor on the thing's own colour.
BOX, OVAL, LEAVES = range(3)
UPRIGHT, SLOPE, FLAT = 128, 190, 255
TYRE, GLASS, LAMP, SKIN, STEEL = (0.08, 0.08, 0.08), (0.2, 0.24, 0.28), (0.9, 0.3, 0.2), (0.75, 0.55, 0.45), (0.5,) * 3
SIGNS = ((0.8, 0.12, 0.12), (0.12, 0.25, 0.75), (0.85, 0.7, 0.1))
# Colours that vary: from and to, of red, green and blue.
LEAF, PLASTER, ANY = ((0.15, 0.4), (0.3, 0.5), (0.1, 0.22)), ((1, 1.15), (0.85, 1), (0.75, 1)), ((0.1, 0.8),) * 3
PARTS = {
    "box":           ((BOX,    0,    1,    0,    1,    UPRIGHT, 1.0),),
    "plate":         ((BOX,    0,    1,    0,    1,    UPRIGHT, 1.0),
                      (BOX,    0.3,  0.7,  0.35, 0.65, UPRIGHT, 1.6)),
    "disc":          ((OVAL,   0,    1,    0,    1,    UPRIGHT, 1.0),
                      (OVAL,   0.3,  0.7,  0.3,  0.7,  UPRIGHT, 1.6)),
    "tree":          ((BOX,    0.44, 0.56, 0,    0.5,  UPRIGHT, (0.32, 0.25, 0.18)),
                      (LEAVES, 0,    0.75, 0.35, 0.85, UPRIGHT, 0.85),
                      (LEAVES, 0.2,  1,    0.4,  1,    UPRIGHT, 1.0)),
    "person":        ((BOX,    0.15, 0.45, 0,    0.5,  UPRIGHT, 0.5),
                      (BOX,    0.55, 0.85, 0,    0.5,  UPRIGHT, 0.5),
                      (BOX,    0,    1,    0.42, 0.84, UPRIGHT, 1.0),
                      (OVAL,   0.22, 0.78, 0.82, 1,    UPRIGHT, SKIN)),
    "side of a car": ((BOX,    0.18, 0.78, 0.55, 1,    FLAT,    0.9),
                      (BOX,    0.22, 0.74, 0.6,  0.92, SLOPE,   GLASS),
                      (BOX,    0,    1,    0.15, 0.53, UPRIGHT, 1.0),
                      (BOX,    0,    1,    0.52, 0.6,  FLAT,    1.15),
                      (OVAL,   0.1,  0.3,  0,    0.32, UPRIGHT, TYRE),
                      (OVAL,   0.7,  0.9,  0,    0.32, UPRIGHT, TYRE)),
    "back of a car": ((BOX,    0.05, 0.95, 0,    0.3,  UPRIGHT, TYRE),
                      (BOX,    0.1,  0.9,  0.55, 1,    FLAT,    0.9),
                      (BOX,    0.16, 0.84, 0.6,  0.92, SLOPE,   GLASS),
                      (BOX,    0,    1,    0.16, 0.53, UPRIGHT, 1.0),
                      (BOX,    0,    1,    0.52, 0.6,  FLAT,    1.15),
                      (BOX,    0.02, 0.18, 0.38, 0.5,  UPRIGHT, LAMP),
                      (BOX,    0.82, 0.98, 0.38, 0.5,  UPRIGHT, LAMP)),
}  # fmt: skip
# One of them on the street, in metres; base: how high it stands, speed: sideways, in image widths between two frames.
Thing = make_dataclass("Thing", "kind label x z width height colour speed base".split())


def layout(seed: int, split: str, index: int) -> SimpleNamespace:
    """All that chance decides about a scene, in metres if not said otherwise. Arguments as in `paint`."""
    key = seed, SPLITS.index(split), index  # so the splits are separate random streams
    rng = np.random.default_rng(key)
    draws = iter(rng.random(512).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    def one_of(*choices):
        return choices[int(len(choices) * next(draws))]

    def pick_colour(ranges, light: float = 1.0) -> tuple[float, float, float]:
        return tuple(light * between(low, high) for low, high in ranges)

    # Ground: grass | sidewalk | road with two edge lines and a dashed one | sidewalk | grass; curb: sidewalk height
    curb, left, right = between(0.15, 0.3), between(-4.2, -1.8), between(1.8, 4.2)
    far_left, far_right = left - between(2, 5), right + between(2, 5)
    middle, line = left + (right - left) * between(0.35, 0.65), between(0.3, 0.5)
    section = np.full(1024, GRASS)  # surfaces by x, 16 to the metre, x = 0 at 512
    strips = [(far_left, far_right, PAVEMENT), (left, right, ASPHALT), (middle, middle + line, DASHED)]
    strips += [(edge, edge + line, MARK) for edge in (left + between(0.2, 1.2), right - between(0.5, 1.5))]
    for start, end, surface in strips:
        section[int(512 + 16 * start) : int(512 + 16 * end)] = surface

    # Background surfaces from VOID to the last house: class, colour, angle. Road and sidewalk are of one grey.
    grey, green = (between(0.3, 0.5),) * 3, pick_colour(LEAF)
    parks = [one_of(True, False) for _ in range(BLOCKS)]
    white, sky = (between(0.75, 0.95),) * 3, (between(0.55, 0.75), between(0.68, 0.78), 0.85)
    surfaces = [(SKY, sky, 0), (ROAD, grey, FLAT), (LANE, white, FLAT), (SIDEWALK, grey, FLAT)]
    surfaces += [(VEGETATION, green, FLAT), (LANE, white, FLAT)]
    for park in parks + [False] * 2 * HOUSES:
        label, colour = (VEGETATION, green) if park else (BUILDING, pick_colour(PLASTER, between(0.3, 0.7)))
        surfaces.append((label, colour, UPRIGHT))
    # Heights of the houses; a gap between two is as high as the sidewalk.
    tall = np.array([one_of(curb, between(4, 16), between(4, 16)) for _ in range(2 * HOUSES)], np.float32)
    things = []

    def place(kind, label, x, z, width, height, colour, speed=0.0, lift=0.0):
        base = lift + (0.0 if left < x < right else curb)
        things.append(Thing(kind, label, x, z, width, height, colour, speed, base))

    for _ in range(one_of(1, 2, 3)):
        x = one_of(far_left - between(0, 2), far_right + between(0, 2))
        place("tree", VEGETATION, x, between(6, 24), between(2.5, 5), between(3.5, 7.5), pick_colour(LEAF))
    for _ in range(one_of(1, 2, 3)):  # hedges and low walls
        x = one_of(far_left - between(0, 1), far_right + between(0, 1))
        label, colour = one_of((VEGETATION, pick_colour(LEAF)), (BUILDING, pick_colour(PLASTER, between(0.3, 0.7))))
        place("box", label, x, between(5, 20), between(2, 5), between(0.8, 1.7), colour)
    for _ in range(one_of(3, 4, 5)):  # posts: bare, with a sign, with the grey back of a sign
        x, z, height = one_of(left - between(0.3, 1.1), right + between(0.3, 1.1)), between(4.5, 12), between(2, 3.5)
        place("box", POLE, x, z, 0.36, height, STEEL)
        label, colour = one_of((None, STEEL), (POLE, STEEL), (SIGN, one_of(*SIGNS)), (SIGN, one_of(*SIGNS)))
        if label is not None:
            width = between(1, 1.4)
            place(one_of("plate", "disc"), label, x, z - 0.01, width, width, colour, lift=height - 0.4)
    for _ in range(one_of(4, 5, 6)):  # a third each: parked cars, moving cars, billboards
        kind, width = one_of(("side of a car", between(3.4, 4.4)), ("back of a car", between(1.7, 2)))
        label, speed = one_of((PARKED, 0.0), (BILLBOARD, 0.0), (MOVING, one_of(-1, 1) * between(0.035, 0.07)))
        x, z, height = between(left - 1.5, right + 1.5), between(2.2, 4.3) ** 2, between(1.4, 1.8)
        place(kind, label, x, z, width, height, pick_colour(ANY), speed)
    for _ in range(one_of(2, 3, 4)):  # people, of whom half walk
        speed = one_of(0.0, one_of(-1, 1) * between(0.02, 0.04))
        x, z, width, height = between(far_left, far_right), between(4, 11), between(0.6, 0.8), between(1.5, 1.9)
        place("person", PEDESTRIAN, x, z, width, height, pick_colour(ANY), speed)

    scene = SimpleNamespace(key=key, section=section, surfaces=surfaces, curb=curb, tall=tall)
    scene.things = sorted(things, key=lambda thing: -thing.z)  # far to near
    scene.centre = between(0.36, 0.64), between(0.36, 0.48)  # (u, v) of the vanishing point
    scene.eye = between(1.5, 2)  # height of the camera
    scene.bend = between(-0.002, 0.002)  # of the road: its x grows by bend * z**2
    scene.slabs = rng.random((2, 64), np.float32) * 0.3 + 0.85  # seams in the ground by x and by z, without meaning
    scene.dash = between(0.25, 0.45), between(0, 1)  # dashes per metre, phase
    scene.crossing = between(4, 30)  # z of a zebra crossing
    scene.walls = far_left - between(0.5, 5.5), far_right + between(0.5, 5.5)  # x of the house fronts
    scene.house = between(6, 12)  # length of a house
    scene.skyline = rng.random(BLOCKS, np.float32) * 0.1 + 0.01  # height in v
    scene.texture = rng.random((TEXELS, TEXELS), np.float32) * 3.4 - 1.7  # mean 0, deviation 1
    scene.ego = between(0.1, 0.3), between(-0.004, 0.004)  # between two frames: metres forward, turn in widths
    scene.shade = far_left, between(left, right)  # the houses' shadow when the sun shines, from x to x
    scene.visibility = between(12, 24)  # in fog
    return scene


def project(scene: SimpleNamespace, H: int, W: int) -> SimpleNamespace:
    """The scene as the camera sees it, before any modality, condition or case: what each pixel shows, and how far."""
    (cu, cv), eye = scene.centre, scene.eye
    u = (np.arange(W, dtype=np.float32) + 0.5) / W  # (W,) of the pixels' centres
    v = ((np.arange(H, dtype=np.float32) + 0.5) / H)[:, None]  # (H, 1)
    texture = scene.texture[(v[:, 0] * TEXELS).astype(np.intp)][:, (u * TEXELS).astype(np.intp)]
    surface = np.full((H, W), VOID, np.intp)  # the number of the surface that each pixel shows
    z = np.full((H, W), 1000, np.float32)
    light = np.repeat(1.1 - 0.3 * v, W, axis=1)

    # The ground: rows from `g` on lie below the horizon, each at one distance.
    g = int(cv * H + 0.5) + 1
    block = (u * BLOCKS).astype(np.intp)
    np.copyto(surface[:g], DASHED + 1 + block, where=v[:g] > cv - scene.skyline[block])
    z[:g][surface[:g] > VOID] = FAR
    ahead = np.minimum(eye / (v[g:] - cv), FAR)  # (H - g, 1)
    x = (u - cu) * ahead - scene.bend * ahead**2  # (H - g, W)
    ground = scene.section[(x * 16 + 512).clip(0, 1023).astype(np.intp)]
    ground[(ground == DASHED) & ((ahead * scene.dash[0] + scene.dash[1]) % 1 < 0.5)] = ASPHALT
    stripes = (np.abs(ahead - scene.crossing) < 1.5) & ((x * 1.2 + 64).astype(np.intp) & 1 == 0)
    ground[stripes & (ground == ASPHALT)] = MARK
    surface[g:] = ground
    raised = (ground == PAVEMENT) | (ground == GRASS)
    z[g:] = ahead * np.where(raised, np.float32(1 - scene.curb / eye), np.float32(1))
    slab_x, slab_z = scene.slabs
    slabs = slab_x[(x * 0.8 + 32).astype(np.intp) & 63] * slab_z[(ahead * 0.7).astype(np.intp)]
    light[g:] = np.where((ground == MARK) | (ground == DASHED), np.float32(1), slabs)

    # House fronts: the two sides of the street, so each image column is at one distance.
    rightwards = u > cu
    front = np.where(rightwards, scene.walls[1], -scene.walls[0]).astype(np.float32) / np.abs(u - cu).clip(1e-3)
    house = np.minimum(front / scene.house, HOUSES - 1).astype(np.intp) + HOUSES * rightwards
    tall = np.where(front < FAR, scene.tall[house], scene.curb).astype(np.float32)
    wall = (v > cv - (tall - eye) / front) & (v < cv + (eye - scene.curb) / front)
    np.copyto(surface, FRONT + house, where=wall)
    np.copyto(z, front, where=wall)
    floor = ((eye + 2 - (v - cv) * front) * 0.7).astype(np.intp)
    window = (floor & (front * 0.8).astype(np.intp) & 1).astype(bool)
    np.copyto(light, np.where(window, np.float32(0.5), np.float32(1)), where=wall)

    # Things, far to near; each part is a surface more. `motion`, sideways between two frames in image widths, reaches
    # as far as a thing will have moved.
    surfaces = [(*background, 0.0) for background in scene.surfaces]
    motion = np.zeros((H, W), np.float32)
    for thing in scene.things:
        scale = 1 / thing.z
        width, height, reach = scale * thing.width, scale * thing.height, abs(thing.speed)
        start, foot = cu + scale * thing.x - width / 2, cv + scale * (eye - thing.base)
        motion[_pixels(foot - height, foot, H), _pixels(start - reach, start + width + reach, W)] = thing.speed
        for shape, left, right, bottom, top, angle, tint in PARTS[thing.kind]:
            rows = _pixels(foot - top * height, foot - bottom * height, H)
            columns = _pixels(start + left * width, start + right * width, W)
            if shape == BOX:
                surface[rows, columns] = len(surfaces)
            else:
                across = (u[columns] - (start + (left + right) / 2 * width)) * (2 / (width * (right - left)))
                upward = (v[rows] - (foot - (bottom + top) / 2 * height)) * (2 / (height * (top - bottom)))
                radius = across * across + upward * upward
                if shape == LEAVES:
                    radius += 0.3 * texture[rows, columns]
                np.copyto(surface[rows, columns], len(surfaces), where=radius < 1)
            angle = UPRIGHT if thing.label == BILLBOARD else angle
            colour = tint if type(tint) is tuple else [tint * c for c in thing.colour]
            behind = 0.8 * (angle > UPRIGHT)  # panes, roof and bonnet lie behind the bumper
            surfaces.append((thing.label, colour, angle, thing.z + behind))
    labels, colours, angles, distances = zip(*surfaces, strict=True)
    painted = surface >= len(scene.surfaces)
    np.copyto(z, np.array(distances, np.float32).take(surface), where=painted)
    np.copyto(light, 1, where=painted)
    label = np.array(labels, np.uint8).take(surface)
    light *= 1 + ROUGHNESS[label] * texture
    angle = np.array(angles, np.uint8).take(surface)
    colour = np.array(colours, np.float32).T.take(surface, axis=1) * light  # (3, H, W): faster than (H, W, 3)
    return SimpleNamespace(u=u, v=v, z=z, x=x, label=label, angle=angle, motion=motion, colour=colour)


def _pixels(start: float, end: float, count: int) -> slice:
    """The pixels whose centres lie between two coordinates (0..1 is the image)."""
    return slice(max(int(start * count + 0.5), 0), max(int(end * count + 0.5), 0))


def _rgb(scene, view, condition: str, case: str, rng: np.random.Generator) -> np.ndarray:
    H, W = view.z.shape
    noise = rng.random((3, H, W), np.float32) - 0.5
    drops = rng.random((2, 60))
    light, grain = view.colour, 0.07  # (3, H, W)
    if condition == "night":  # the car's own lamps, and little else
        light, grain = light * (0.14 + 0.4 * np.exp(view.z / -10)), 0.12
    elif condition == "fog":
        clear = np.exp(view.z / -scene.visibility)
        light = light * clear + 0.7 * (1 - clear)
    elif condition == "rain":
        light, grain = 0.65 * light + 0.08, 0.1
        rows = (drops[0] * H).astype(np.intp) + np.arange(max(2, H // 9))[:, None]  # (length, drops)
        columns = (drops[1] * W).astype(np.intp) + (rows - rows[0]) // 4
        rows, columns = rows.clip(0, H - 1), columns.clip(0, W - 1)
        light[:, rows, columns] = 0.6 * light[:, rows, columns] + 0.3
    elif condition == "sun":
        light = light * np.float32([1.5, 1.42, 1.25])[:, None, None]
        shaded = (view.x > scene.shade[0]) & (view.x < scene.shade[1])
        light[:, H - len(shaded) :] *= np.where(shaded, np.float32(0.45), np.float32(1))
    if case == "motionblur":  # a box filter along the rows
        width = max(3, W // 20 * 2 + 1)
        total = np.cumsum(np.pad(light, ((0, 0), (0, 0), (width // 2 + 1, width // 2)), "edge"), axis=2)
        light = (total[..., width:] - total[..., :-width]) / width
    elif case == "overexposure":
        light = light * 2.2 + 0.15
    elif case == "underexposure":
        light = light * 0.25
    return np.dstack(((light + grain * noise) * 255).clip(0, 255).astype(np.uint8))  # (H, W, 3)


def _distance_and_height(scene, z: np.ndarray, v: np.ndarray, third: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(h, W, 3) uint8, 0 where not seen: log distance (1 m 255, 70 m 1), root of height (10 m 253), a third channel."""
    log = (255 - 60 * np.log(z)).clip(1, 255)
    root = 80 * np.sqrt((scene.eye - (v - scene.centre[1]) * z).clip(0, 10))
    return np.dstack([(channel * seen).astype(np.uint8) for channel in (log, root, third)])


def _depth(scene, view, condition: str, case: str, rng: np.random.Generator) -> np.ndarray:
    chance = rng.random(view.z.shape, np.float32)
    seen = view.label != SKY
    if condition == "fog":  # the farther, the more pixels without a measurement
        seen &= chance < np.exp(-((view.z / (2 * scene.visibility)) ** 2))
    return _distance_and_height(scene, view.z, view.v, view.angle, seen)


def _event(scene, view, condition: str, case: str, rng: np.random.Generator) -> np.ndarray:
    """Log brightness against the frame before, which is this one pulled back along ego motion and the things' own."""
    H, W = view.z.shape
    noise = rng.random((H, W), np.float32)
    level = np.log((np.float32([0.3, 0.6, 0.1]) @ view.colour.reshape(3, -1)).clip(0) + 0.05)  # (H * W,)
    (cu, cv), (forward, yaw) = scene.centre, scene.ego
    near = forward / view.z
    column = ((view.u - yaw - (view.u - cu) * near - view.motion) * W - 0.5).clip(0, W - 1.001)
    row = ((view.v - (view.v - cv) * near) * H - 0.5).clip(0, H - 1.001)
    left, top = column.astype(np.intp), row.astype(np.intp)
    du, dv, at = column - left.astype(np.float32), row - top.astype(np.float32), top * W + left
    upper, lower = level[at], level[at + W]  # bilinear
    upper += (level[at + 1] - upper) * du
    lower += (level[at + W + 1] - lower) * du
    change = upper + (lower - upper) * dv - level.reshape(H, W)
    brighter, darker = (change > 0.2) | (noise < 0.005), (change < -0.2) | (noise > 0.995)
    out = np.dstack([brighter, darker, np.zeros_like(darker)]) * np.uint8(255)
    if case == "eventlowres":
        out = out[np.arange(H) // 2 * 2][:, np.arange(W) // 2 * 2]
    return out


def _lidar(scene, view, condition: str, case: str, rng: np.random.Generator) -> np.ndarray:
    H, W = view.z.shape
    texel = (view.v[:, 0] * TEXELS).astype(np.intp)
    scan = np.flatnonzero(texel % 4 == 1)  # every fourth row of texels
    if not scan.size:
        scan = np.arange(1, len(texel), 4)  # at some sizes, such as 48, no pixel lies in such a row
    chance = rng.random((scan.size, W), np.float32)
    error = 0.98 + 0.04 * rng.random((scan.size, W), np.float32)
    shifts = ((rng.random(TEXELS) - 0.5) * W / 6).astype(np.intp)
    z, v, label = view.z[scan], view.v[scan], view.label[scan]
    keep = 0.9 * np.exp(z / -60)
    if condition == "rain":
        keep *= 0.55
    elif condition == "fog":
        keep *= np.exp(z / -30)
    seen = (chance < keep) & (label != SKY)
    rows = _distance_and_height(scene, z * error, v, 255 * REFLECTANCE[label] * error, seen)
    if case == "lidarjitter":
        rows = np.take_along_axis(rows, (np.arange(W) + shifts[texel[scan], None])[..., None] % W, axis=1)
    out = np.zeros((H, W, 3), np.uint8)
    out[scan] = rows
    return out


PAINTERS = {"rgb": _rgb, "depth": _depth, "event": _event, "lidar": _lidar}


def weather(index: int) -> tuple[str, str]:
    """The condition of scene `index`, each in every fifth, and its case, which one scene of six has."""
    return CONDITIONS[index % 5], CASES[index // 30 % 5] if index // 5 % 6 == 5 else "none"


def paint(
    seed: int, split: str, index: int, size: int | tuple[int, int] = 64, condition: str = "", case: str = ""
) -> dict[str, np.ndarray | str]:
    """Scene `index` of a split in its four modalities; with another seed, another scene.

    seed and index are at least 0. size: H = W, or (H, W), in pixels, at least 8; the same scene at any size.
    condition: of CONDITIONS; case: of CASES, or "none"; empty: by `weather`.
    Returns uint8 (H, W, 3): "rgb"; "depth" (log distance, height, surface angle, as in HHA; 0 = sky or unseen); "event"
    (positive, negative, 0); "lidar" (log range, height, intensity; 0 = no return). uint8 (H, W), 0..11: "label". And
    the str "condition" and "case". ValueError for an argument outside these ranges.
    """
    H, W = (size, size) if isinstance(size, int) else size
    condition, case = condition or weather(index)[0], case or weather(index)[1]
    for value, known in ((split, SPLITS), (condition, CONDITIONS), (case, ("none", *CASES))):
        if value not in known:
            raise ValueError(f"{value!r} is unknown; choose one of {', '.join(known)}")
    if min(seed, index) < 0 or min(H, W) < 8:
        raise ValueError(f"scene (seed {seed}, index {index}) of {H} x {W} pixels: use at least 0, 0 and 8 x 8")
    scene = layout(seed, split, index)
    view, rng = project(scene, H, W), np.random.default_rng([*scene.key, 1])
    # Each modality draws its noise in every condition, so that a condition changes its own modalities and nothing else.
    images = {name: painter(scene, view, condition, case, rng) for name, painter in PAINTERS.items()}
    return {**images, "label": view.label, "condition": condition, "case": case}
