"""What a method is asked to erase: a value, with presets. It knows no pipeline and imports nothing of the package."""

from typing import NamedTuple

# Frames for an object in a prompt, in the manner of textual inversion's 27, which are not reproduced.
TEMPLATES = tuple(
    f"a {kind} of {article} {{}}"
    for article in ("a", "the")
    for kind in ("photo", "cropped photo", "close-up photo", "bright photo", "dark photo", "good photo", "rendering")
)


class Concept(NamedTuple):
    """A concept to erase. The first four fields are enough for most methods.

    `spqr_jax.methods.tools.concepts.completed` derives the fields that are left empty.

    Attributes:
        name: for file names and messages.
        erase: texts whose content is to disappear.
        target: what they become (" ": nothing in particular).
        preserve: texts whose output closed-form methods keep.
        prompts: whole prompts that show the concept; methods that learn from images make and caption them with these.
            Prompt i shows erase[i % len(erase)]. Default: `erase`.
        replacements: benign prompts; an image of prompt i is relabelled to replacement i (modulo their number), and
            images of them are what must survive. Default: `retain`, else `target`.
        retain: benign prompts whose output must survive. Default: `preserve`.
        anchors: prompts around the concept that STEREO steers towards. Default: `retain`.
        templates: frames with {} that embedding attacks put a learned word into. Default: `TEMPLATES`.
    """

    name: str
    erase: tuple[str, ...]
    target: str = " "
    preserve: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    replacements: tuple[str, ...] = ()
    retain: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


# The classes of COCO, the kind of object the authors of AdvUnlearn retain (their list of 243 is not reproduced).
_OBJECTS = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, pair of skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, "
    "toilet, television, laptop, computer mouse, remote control, keyboard, cell phone, microwave, oven, toaster, "
    "sink, refrigerator, book, clock, vase, pair of scissors, teddy bear, hair dryer, toothbrush"
)
RETAIN = tuple(f"a photo of a {name}" for name in _OBJECTS.split(", "))
CLOTHED = ("a photo of a person wearing clothes",)
# STEREO's anchors name the concept in varied surroundings; theirs are about 200 generated sentences, these are ours.
_SCENES = (
    "in a field of wheat, in a sunlit forest, in an old library, beside a calm lake, on a rocky shore, "
    "in a stone ruin, under a waterfall, on a mountain path, in a flower garden, in an empty theatre, "
    "by a fireplace, in a snowy valley, in a desert at dusk, on a wooden pier, in a greenhouse, in a marble hall, "
    "on a city roof, in a misty meadow, under a starry sky, in an artist's studio, at a riverbank, "
    "in a bamboo grove, on a balcony, in a cave, beneath an arch, in an orchard, on a sand dune, in a cathedral, "
    "near a lighthouse, in an autumn park, on a staircase, in a vineyard, at a market square, in a courtyard, "
    "by a window, in a canyon, on a bridge, in the rain, in a barn, at sunrise"
)
SCENES = tuple(_SCENES.split(", "))
FIGURES = ("figure", "form", "silhouette", "body", "model")

NUDITY = Concept(
    "nudity",
    ("nudity",),
    prompts=("a photo of a nude person",),
    replacements=CLOTHED,
    retain=RETAIN,
    anchors=tuple(f"a nude {figure} {scene}" for figure in FIGURES for scene in SCENES),
)
# The eleven words that I2P and the papers built on it erase together.
NSFW = Concept(
    "nsfw",
    (
        "hate",
        "harassment",
        "violence",
        "suffering",
        "humiliation",
        "harm",
        "suicide",
        "sexual",
        "nudity",
        "bodily fluids",
        "blood",
    ),
    replacements=CLOTHED,
    retain=RETAIN,
)
NSFW = NSFW._replace(anchors=tuple(f"{word} {scene}" for word in NSFW.erase for scene in SCENES[:20]))
PRESETS = {"nudity": NUDITY, "nsfw": NSFW}
