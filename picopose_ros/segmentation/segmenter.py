"""The segmenter of this package: proposals, told apart by the template banks. No ROS in here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from picopose_ros.errors import PicoPoseError, SegmentError
from picopose_ros.model import PicoPose
from picopose_ros.segmentation.matching import MatchSettings, TemplateMatcher
from picopose_ros.segmentation.proposals import Picture, Propose, check_proposals, without_doubles
from picopose_ros.segmentation.search import BankSearch
from picopose_ros.segmentation.segments import Segment
from picopose_ros.templates.bank import TemplateBank


@dataclass(frozen=True)
class Segmentation:
    """What was found in an image.

    Attributes:
        segments: surest first. proposals: how many were looked at.
        problem: what of the proposals could not be used; "" if all could.
        timings: milliseconds: propose, search, match, total.
    """

    segments: list[Segment]
    proposals: int
    problem: str = ""
    timings: dict[str, float] = field(default_factory=dict)


class Segmenter:
    """Finds the objects of some banks in images. Not for use by two threads at once.

    Args:
        model: in evaluation mode. banks: by class id, made with it.
        propose: the proposal source.
        search: also look where the banks' surfaces are, see `BankSearch`.
        settings: of the matching; the defaults if None.
        device: of the network. dtype: what crops are encoded in.
    """

    def __init__(
        self,
        model: PicoPose,
        banks: Mapping[str, TemplateBank],
        propose: Propose,
        search: bool = True,
        settings: MatchSettings | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.matcher = TemplateMatcher(model, banks, settings, device, dtype)
        self._propose = propose
        self._search = BankSearch(self.matcher) if search and banks else None

    def segment(self, picture: Picture) -> Segmentation:
        """The objects in an image.

        Raises:
            SegmentError: the proposal source failed; the next image may be fine.
        """
        begun = time.perf_counter()
        try:
            masks, problem = check_proposals(self._propose(picture), picture.rgb)
        except PicoPoseError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SegmentError(f"the proposal source failed ({type(error).__name__}: {reason})") from error
        proposed = time.perf_counter()
        if self._search is not None:
            masks = without_doubles([*self._search(picture), *masks])
        searched = time.perf_counter()
        found = self.matcher.match(picture.rgb, masks)
        done = time.perf_counter()
        timings = {
            "propose": 1e3 * (proposed - begun),
            "search": 1e3 * (searched - proposed),
            "match": 1e3 * (done - searched),
            "total": 1e3 * (done - begun),
        }
        segments = [Segment(match.class_id, min(match.score, 1.0), match.mask) for match in found]
        return Segmentation(segments, len(masks), problem, timings)
