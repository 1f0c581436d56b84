"""Procedurally drawn textures, the backbone's second task: it learns to name them.

Every class is a family with a range of parameters (scale, density, polarity, sharpness). Contrast,
light, colour and background vary freely inside a class. No photograph is involved.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128
# Drawn larger and reduced, so that thin lines are antialiased.
OVERSAMPLING = 2


def spectrum_noise(rng, beta=None, period=None, width=0.35, angle=None, stretch=1.0):
    """Noise with a power law spectrum (beta) or a band around one period; stretch > 1 gives grain
    along the angle. Mean 0, deviation 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.rfftfreq(SIDE), indexing="ij")
    if angle is not None:
        c, s = math.cos(angle), math.sin(angle)
        fx, fy = (c * fx + s * fy) * stretch, -s * fx + c * fy
    radius = np.hypot(fx, fy)
    radius[0, 0] = 1.0
    if beta is not None:
        gain = radius ** (-beta / 2)
    else:
        gain = np.exp(-0.5 * (np.log(radius * period) / width) ** 2)
    gain[0, 0] = 0.0
    phases = np.fft.rfft2(rng.standard_normal((SIDE, SIDE)))
    field = np.fft.irfft2(phases * gain, s=(SIDE, SIDE))
    return field / (field.std() + 1e-9)


class Canvas:
    """Shapes drawn in gray on black, then reduced to SIDE × SIDE values 0..1."""

    def __init__(self):
        self.image = Image.new("L", (SIDE * OVERSAMPLING,) * 2, 0)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, width, value=255):
        points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in points]
        self.draw.line(points, fill=int(value), width=max(1, round(width * OVERSAMPLING)),
                       joint="curve")

    def blob(self, x, y, rx, ry, angle, value=255):
        turns = np.linspace(0, 2 * math.pi, 18, endpoint=False)
        px, py = rx * np.cos(turns), ry * np.sin(turns)
        c, s = math.cos(angle), math.sin(angle)
        points = np.stack([x + c * px - s * py, y + s * px + c * py], 1) * OVERSAMPLING
        self.draw.polygon([tuple(p) for p in points], fill=int(value))

    def field(self, blur=0.0):
        image = self.image
        if blur > 0:
            image = image.filter(ImageFilter.GaussianBlur(blur * OVERSAMPLING))
        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) / 255


def spots(rng, radius, coverage, elongation=1.0, aligned=False):
    canvas, angle = Canvas(), rng.uniform(0, math.pi)
    count = int(coverage * SIDE * SIDE / (math.pi * radius * radius * elongation)) + 1
    for _ in range(count):
        r = radius * rng.uniform(0.7, 1.4)
        turn = angle + rng.normal(0, 0.12) if aligned else rng.uniform(0, math.pi)
        x, y = rng.uniform(0, SIDE, 2)
        canvas.blob(x, y, r * elongation, r, turn, rng.uniform(150, 255))
    return canvas.field(rng.uniform(0, 0.25) * radius)


def scratches(rng, count, aligned):
    canvas, angle = Canvas(), rng.uniform(0, math.pi)
    for _ in range(count):
        turn = angle + rng.normal(0, 0.06) if aligned else rng.uniform(0, math.pi)
        x, y = rng.uniform(0, SIDE, 2)
        half, bend = rng.uniform(0.25, 0.9) * SIDE, rng.normal(0, 3)
        c, s = math.cos(turn), math.sin(turn)
        points = [(x + t * half * c - bend * (1 - t * t) * s, y + t * half * s + bend * (1 - t * t) * c)
                  for t in np.linspace(-1, 1, 7)]
        canvas.line(points, rng.uniform(0.6, 2.5), rng.uniform(120, 255))
    return canvas.field(rng.uniform(0, 0.6))


def cracks(rng, count, step, wander):
    canvas = Canvas()
    starts = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0, 2 * math.pi), 1.0)
              for _ in range(count)]
    for _ in range(count * 3):  # every crack may branch about twice
        if not starts:
            break
        x, y, turn, width = starts.pop()
        points = [(x, y)]
        for _ in range(int(rng.uniform(12, 40))):
            turn += rng.normal(0, wander)
            x, y = x + step * math.cos(turn), y + step * math.sin(turn)
            points.append((x, y))
            if rng.random() < 0.05 and width > 0.5:
                starts.append((x, y, turn + rng.choice([-1, 1]) * rng.uniform(0.5, 1.2), width * 0.7))
        canvas.line(points, width * rng.uniform(0.8, 2.0), rng.uniform(140, 255))
    return canvas.field(rng.uniform(0, 0.5))


def cells(rng, spacing, edges):
    """Voronoi cells: their edges, or each in its own gray."""
    count = max(4, int((SIDE / spacing) ** 2))
    centres = rng.uniform(0, SIDE, (count, 2))
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).reshape(-1, 2).astype(float)
    near = np.full(len(grid), 1e9)
    second = near.copy()
    owner = np.zeros(len(grid), int)
    for index, centre in enumerate(centres):
        distance = ((grid - centre) ** 2).sum(1)
        closer = distance < near
        second = np.where(closer, near, np.minimum(second, distance))
        owner[closer] = index
        near = np.where(closer, distance, near)
    if edges:
        gap = np.sqrt(second) - np.sqrt(near)
        return np.exp(-gap / rng.uniform(0.8, 2.0)).reshape(SIDE, SIDE)
    return rng.random(count)[owner].reshape(SIDE, SIDE)


def islands(rng, period, share, soft):
    field = spectrum_noise(rng, period=period, width=rng.uniform(0.3, 0.7))
    level = np.quantile(field, 1 - share)
    return 1 / (1 + np.exp(-np.clip((field - level) * (2.5 if soft else 14), -40, 40)))


def waves(rng, period, kind):
    angle = rng.uniform(0, math.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    u = (x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period
    v = (-x * math.sin(angle) + y * math.cos(angle)) * 2 * math.pi / period
    if kind == "stripes":
        field = np.sin(u)
    elif kind == "mesh":
        field = np.maximum(np.sin(u), np.sin(v))
    elif kind == "checks":
        field = np.sin(u) * np.sin(v)
    else:  # marble: stripes bent by slow noise
        field = np.sin(u + rng.uniform(1.5, 3) * spectrum_noise(rng, period=period * 4))
    return np.tanh(field * rng.uniform(0.8, 4)) / 2 + 0.5


def pits(rng, radius, coverage):
    """Round hollows lit from one side."""
    field, angle = np.zeros((SIDE, SIDE)), rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for _ in range(int(coverage * SIDE * SIDE / (radius * radius * 3)) + 1):
        r = radius * rng.uniform(0.6, 1.5)
        cx, cy = rng.uniform(0, SIDE, 2)
        y0, y1 = max(0, int(cy - 3 * r)), min(SIDE, int(cy + 3 * r) + 1)
        x0, x1 = max(0, int(cx - 3 * r)), min(SIDE, int(cx + 3 * r) + 1)
        dx, dy = (x[y0:y1, x0:x1] - cx) / r, (y[y0:y1, x0:x1] - cy) / r
        bell = np.exp(-(dx * dx + dy * dy))
        field[y0:y1, x0:x1] += bell * (dx * math.cos(angle) + dy * math.sin(angle) - 0.4)
    return field


def classes():
    """All classes: name → function of a random generator giving a field."""
    table = {}
    for beta in (0.8, 1.7, 2.8):
        table[f"fractal-{beta}"] = lambda g, b=beta: spectrum_noise(g, beta=b + g.uniform(-0.25, 0.25))
    for period in (3, 6, 12, 24):
        table[f"grain-{period}"] = lambda g, p=period: spectrum_noise(g, period=p * g.uniform(0.85, 1.2))
    for period in (4, 9, 20):
        table[f"brushed-{period}"] = lambda g, p=period: spectrum_noise(
            g, period=p * g.uniform(0.85, 1.2), angle=g.uniform(0, math.pi), stretch=g.uniform(3, 8))
    for kind in ("stripes", "mesh", "checks", "marble"):
        for period in (5, 11, 24):
            table[f"{kind}-{period}"] = lambda g, k=kind, p=period: waves(g, p * g.uniform(0.8, 1.25), k)
    for sign, polarity in ((1, "light"), (-1, "dark")):
        for radius in (1.3, 3, 7):
            for coverage, density in ((0.02, "few"), (0.2, "many")):
                table[f"spots-{polarity}-{radius}-{density}"] = (
                    lambda g, s=sign, r=radius, c=coverage: s * spots(g, r, c * g.uniform(0.7, 1.4)))
        for count, density in ((2, "few"), (14, "many")):
            for aligned in (True, False):
                table[f"scratches-{polarity}-{density}-{'row' if aligned else 'cross'}"] = (
                    lambda g, s=sign, n=count, a=aligned: s * scratches(g, int(n * g.uniform(1, 1.6)), a))
        for step, wander, name in ((2, 0.35, "fine"), (5, 0.5, "jagged")):
            table[f"cracks-{polarity}-{name}"] = (
                lambda g, s=sign, p=step, w=wander: s * cracks(g, int(g.uniform(3, 9)), p, w))
        for period in (8, 18, 40):
            for soft in (True, False):
                table[f"islands-{polarity}-{period}-{'soft' if soft else 'hard'}"] = (
                    lambda g, s=sign, p=period, f=soft: s * islands(
                        g, p * g.uniform(0.85, 1.2), g.uniform(0.12, 0.3), f))
        for aligned in (True, False):
            table[f"dashes-{polarity}-{'row' if aligned else 'cross'}"] = (
                lambda g, s=sign, a=aligned: s * spots(g, g.uniform(0.7, 1.2), 0.08, g.uniform(5, 10), a))
    for spacing in (9, 18, 36):
        table[f"net-{spacing}"] = lambda g, p=spacing: cells(g, p * g.uniform(0.85, 1.2), True)
        table[f"tiles-{spacing}"] = lambda g, p=spacing: cells(g, p * g.uniform(0.85, 1.2), False)
    for radius in (1.8, 4.5):
        table[f"pits-{radius}"] = lambda g, r=radius: pits(g, r, g.uniform(0.05, 0.3))
    table["plain"] = lambda g: np.zeros((SIDE, SIDE))
    return table


TABLE = classes()
NAMES = list(TABLE)


def draw(seed, index):
    """Image `index` of the endless set: uint8 [SIDE, SIDE, 3] and its class number."""
    rng = np.random.default_rng([seed, index])
    number = index % len(NAMES)
    field = TABLE[NAMES[number]](rng)
    spread = field.std()
    if spread > 1e-6:
        field = (field - field.mean()) / max(spread, 0.08)
    # Faint things must be seen too: contrast spans a decade.
    signal = math.exp(rng.uniform(math.log(0.05), math.log(0.25))) * field
    ground = rng.uniform(0.0, 0.3) * math.exp(rng.uniform(math.log(0.1), 0)) * 0.25
    signal = signal + ground * spectrum_noise(rng, beta=rng.uniform(0.5, 2.5))
    y, x = np.mgrid[-1:1:SIDE * 1j, -1:1:SIDE * 1j]
    tilt = rng.uniform(0, 2 * math.pi)
    signal = signal + rng.uniform(0, 0.15) * (x * math.cos(tilt) + y * math.sin(tilt))
    level = rng.uniform(0.2, 0.8)
    if rng.random() < 0.6:
        pixels = np.repeat((level + signal)[..., None], 3, 2)
    else:  # along a random colour, over another
        base = np.clip(level + rng.normal(0, 0.15, 3), 0.05, 0.95)
        pixels = base + signal[..., None] * (1 + rng.normal(0, 0.5, 3))
    pixels = pixels + rng.normal(0, rng.uniform(0.002, 0.03), (SIDE, SIDE, 1))
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8), number


def draw_many(job):
    """(seed, start, count) → arrays of images and class numbers; one job of a process pool."""
    seed, start, count = job
    pairs = [draw(seed, index) for index in range(start, start + count)]
    return np.stack([p[0] for p in pairs]), np.array([p[1] for p in pairs])
