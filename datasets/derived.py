"""Event and lidar images computed from a frame's colour and depth, for data sets that have no such sensors.

    event = derive_event(rgb, metres, "0001")       # rgb (H, W, 3) uint8, metres (H, W) float32, the frame's name
    lidar = derive_lidar(metres, "0001")            # both (H, W, 3) uint8

Not in the paper. No sensor measured these images, so they are always called derived. They are computed while a frame
loads, at less than the cost of decoding it. Chance comes from the frame's name alone.
"""

import zlib

import numpy as np

FOCAL = 0.81  # of the Kinect, in image widths: 519 of 640 pixels
FORWARD = (0.02, 0.08)  # metres that the camera moves ahead between two frames, from and to
SIDEWAYS = 0.03  # metres that it moves to the left or right, at most
TURN = 0.003  # its turn to the left or right, in image widths, at most
THRESHOLD = 0.2  # change of log intensity that fires an event
LOG = np.log(np.arange(256, dtype=np.float32) / 255 + 0.05)  # + 0.05: noise in the dark fires nothing
PLAIN = 32  # levels of 255: a line of pixels that varies less is of one colour
SCANS = 48  # lidar rows over the image's height
KEPT, FADE = 0.9, 20.0  # share of the points that return: KEPT * exp(-metres / FADE)
NOISE = 0.03  # of the range, in metres, at most


def inside_border(grey: np.ndarray, axis: int) -> slice:
    """The rows (axis 0) or columns (1) of an image (H, W) inside its border, such as the white one of NYU Depth v2."""
    # The border: lines of one colour, up to a sixteenth of the image, and the next one, where JPEG mixes the two.
    plain = np.ptp(grey, 1 - axis) < PLAIN  # (H,) or (W,)
    first, last = (min(int(line.argmin()), plain.size // 16) for line in (plain, plain[::-1]))
    return slice(first + (first > 0), plain.size - last - (last > 0))


def frame_rng(seed: int, name: str, *more: int) -> np.random.Generator:
    """Chance for a frame: the same in any batch, worker, subset of modalities and on any device."""
    return np.random.default_rng([seed, zlib.crc32(name.encode(errors="surrogateescape")), *more])


def derive_event(rgb: np.ndarray, metres: np.ndarray, name: str) -> np.ndarray:
    """What an event camera sees when it moves a little; the frame's name decides how.

    The depth of a pixel tells where its point was before: near points have moved more. The pixel fires if log
    intensity differs by THRESHOLD between the two, to the nearest pixel. Occlusion is not modelled.

    rgb: (H, W, 3) uint8. metres: (H, W) float32, its depth; 0, not measured, counts as infinitely far.
    Returns (H, W, 3) uint8, 0 or 255, as in DELIVER: brighter than before, darker, empty. A border of one colour has
    no events. ValueError if rgb is of another kind or size.
    """
    H, W = metres.shape
    if rgb.shape != (H, W, 3) or rgb.dtype != np.uint8:
        what = f"rgb is {rgb.dtype} {rgb.shape}, depth {(H, W)}"
        raise ValueError(f"frame {name}: {what}; events are derived from 8-bit colours and depth of one size")
    rng = frame_rng(0, f"event {name}")
    forward, sideways, turn = rng.uniform(*FORWARD), rng.uniform(-SIDEWAYS, SIDEWAYS), rng.uniform(-TURN, TURN)
    grey = rgb[..., 1].copy()  # green: most of what the eye calls brightness
    rows, columns = inside_border(grey, 0), inside_border(grey, 1)
    level, metres = LOG.take(grey[rows, columns]), metres[rows, columns]  # (h, w)
    h, w = level.shape
    near = (metres > 0) / metres.clip(0.01)  # 1 / metres, or 0
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    u, v = x + (columns.start - (W - 1) / 2), y + (rows.start - (H - 1) / 2)  # from the image's centre
    x = x - W * turn - (W * FOCAL * sideways + u * forward) * near  # (h, w), before the motion
    y = y - v * forward * near
    before = np.rint(y.clip(0, h - 1)) * w + np.rint(x.clip(0, w - 1))
    change = level - level.take(before.astype(np.intp))
    out = np.zeros_like(rgb)
    out[rows, columns, 0] = (change > THRESHOLD) * np.uint8(255)
    out[rows, columns, 1] = (change < -THRESHOLD) * np.uint8(255)
    return out


def derive_lidar(metres: np.ndarray, name: str) -> np.ndarray:
    """What a lidar sees: the depth along SCANS rows, with noise, and with fewer returns from far away.

    Takes the metres and the name of `derive_event`; no measurement, no return. Returns (H, W, 3) uint8, three equal
    channels, 0 = no return, else 255 - 80 ln(metres / 0.5): 255 up to 0.5 m, 200 at 1 m, 15 at 10 m, 1 from 12 m on.
    """
    rows = ((np.arange(SCANS) + 0.5) * len(metres) / SCANS).astype(np.intp)
    scans = metres[rows]  # (SCANS, W)
    chance, noise = frame_rng(0, f"lidar {name}").random((2, *scans.shape), np.float32)
    returned = (scans > 0) & (chance < KEPT * np.exp(scans / -FADE))
    code = 255 - 80 * np.log((scans + NOISE * (2 * noise - 1)).clip(0.01) / 0.5)
    out = np.zeros((*metres.shape, 3), np.uint8)
    out[rows] = (np.rint(code.clip(1, 255)) * returned).astype(np.uint8)[..., None]
    return out
