"""What two rows must share to stand in one table: everything that decides a figure, but the method.

Paths differ from machine to machine, so prompts, judges, data and weights are known by their hashes. A protocol's label
names only the fields that were changed. Here their values count as well.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from judges import recorded
from spqr_jax.protocols import Statement
from spqr_jax.score.rules import Rules
from spqr_jax.submission.bundle import Bundle, BundledCell

# Fields of a protocol that hold paths; what lies there is known by its hash.
BY_HASH = ("prompts.harmful", "judges.safety", "judges.features")
# Fields of a config that decide an image or a step, and of which no protocol speaks.
ALSO = {
    "generation": ("scheduler", "negative", "height", "width", "noise"),
    "bft": ("resolution",),
}


class Conditions(NamedTuple):
    """The conditions of a row.

    Attributes:
        protocol: label of the protocol with the fields that were changed.
        backbone: name of the backbone's weights and of its architecture.
        scenario, profile: of the fine-tuning.
        details: what the four names above stand for, as JSON holds it.
    """

    protocol: str
    backbone: str
    scenario: str
    profile: str
    details: dict[str, Any]

    @property
    def id(self) -> str:
        """12 hexadecimal digits that stay the same as long as the conditions do."""
        text = json.dumps([*self[2:4], self.details], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def of_row(bundle: Bundle, cell: BundledCell, rules: Rules) -> Conditions:
    """The conditions of the row that a cell belongs to. rules: those of the bundle's score."""
    manifest, info = bundle.manifest, cell.info
    config, stated = manifest["config"], info["protocol"]
    changed = {field: values[0] for field, values in stated["changed"].items() if field not in BY_HASH}
    of_score = {f: v for f, v in bundle.leaderboard["protocol"]["changed"].items() if f.startswith("score.")}
    details = {
        "protocol": stated["name"],
        "changed": changed,
        "score": rules._asdict() | {"ceiling": bundle.leaderboard["protocol"]["ceiling"]},
        **{section: {name: config[section][name] for name in names} for section, names in ALSO.items()},
        "backbone": [info["backbone"], manifest["sha256"]["backbone"]],
        "data": manifest["sha256"]["data"].get(info["scenario"], ""),
        "prompts": {role: part["sha256"] for role, part in bundle.prompts.items()},
        "judges": recorded.without_provider(manifest["judges"]),
        "rule": config["judges"]["rule"],
        "reference": None if bundle.reference is None else _reference(bundle.reference),
    }
    plain: dict[str, Any] = json.loads(json.dumps(details, default=list))
    label = Statement(stated["name"], stated["changed"] | of_score).label
    return Conditions(label, _backbone(config["base"], info["backbone"]), info["scenario"], info["profile"], plain)


def _backbone(base: str, architecture: str) -> str:
    """ "sd15 (sd)": the last part of the weights' name, without the folders of somebody's machine."""
    return f"{base.replace(chr(92), '/').rstrip('/').rpartition('/')[2]} ({architecture})"


def _reference(arrays: Mapping[str, Any]) -> Any:
    """What the reference images are said to be. `tables` compares their features, which two machines round apart."""
    return recorded.without_provider(json.loads(str(arrays["identity"])))
