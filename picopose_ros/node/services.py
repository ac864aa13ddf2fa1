"""What the node's services do: poses of one image, and the mesh directory looked at again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

from std_srvs.srv import Trigger

from picopose_ros.errors import PicoPoseError
from picopose_ros.messages.frames import FrameReader, FrameRefused
from picopose_ros.messages.segmentations import segment_reader
from picopose_ros.node.conversions import detections_message
from picopose_ros.node.engine import Engine
from picopose_ros.node.objects import ObjectSet, Progress, describe_change
from picopose_ros.node.parameters import SPECS, NodeParameters
from picopose_ros.node.worker import NewestWorker
from picopose_ros.srv import EstimatePoses

REQUEST_TOPICS: Mapping[str, str] = {
    "image": "the request",
    "camera_info": "the request",
    "segmentation": "the request",
}
"""Where the parts of a request came from, for the messages about them."""


def estimate_poses(
    request: EstimatePoses.Request,
    response: EstimatePoses.Response,
    engine: Engine,
    worker: NewestWorker[Any],
    settings: NodeParameters,
    rectified: bool,
) -> EstimatePoses.Response:
    """Fill in the response to a request for poses. Waits for the worker; not to be called from its thread.

    Args:
        engine: what estimates. worker: on whose thread it does so. settings: min_score and hypotheses.
        rectified: the node's images are rectified, so the request's are too.
    """
    started = time.monotonic()
    most = int(SPECS["hypotheses"].maximum or 1)
    if request.hypotheses > most:
        response.status = f"hypotheses is {request.hypotheses}: give 1 to {most}, or 0 for the parameter's"
        return response
    unknown = [name for name in request.class_ids if engine.objects.class_of(name) is None]
    if unknown:
        known = ", ".join(sorted(engine.objects.banks))
        response.status = f"class_ids has '{unknown[0]}', but the objects are {known}"
        return response
    wanted = {engine.objects.class_of(name) for name in request.class_ids}
    reader = FrameReader(REQUEST_TOPICS, segment_reader("segments", "", REQUEST_TOPICS), rectified)
    try:
        frame = reader.read(request.image, request.camera_info, request.segments)
    except FrameRefused as refused:
        response.status = f"[{refused.reason.value}] {refused}"
        return response
    segments = [s for s in frame.segments if not wanted or engine.objects.class_of(s.class_id) in wanted]
    decoded = time.monotonic()

    def work() -> tuple[float, Any, Any]:
        begun = time.monotonic()
        hypotheses = request.hypotheses or settings.hypotheses
        result = engine.estimate(
            frame.rgb, frame.camera, segments, hypotheses, settings.prune, settings.refinements
        )
        return begun, result, engine.judge(result, segments, settings.min_score)

    try:
        begun, result, judged = worker.call(work).result()
    except CancelledError:
        response.status = "the node was cleaned up or shut down before the estimator was free"
        return response
    numbers: Counter[str] = Counter()
    names = []
    for pose in judged.poses:
        names.append(f"{pose.class_id}_{numbers[pose.class_id]}")
        numbers[pose.class_id] += 1
    response.success = True
    response.detections = detections_message(judged.poses, names, request.image.header)
    looked = len(segments) + len(frame.bad)
    response.status = f"{len(judged.poses)} poses of {looked} segments"
    response.status += "".join(
        f"; [{problem.reason.value}] {problem.message}" for problem in [*frame.bad, *judged.dropped]
    )
    timings = {"decode": 1e3 * (decoded - started), "queue": 1e3 * (begun - decoded), **result.timings}
    timings["total"] = 1e3 * (time.monotonic() - started)
    response.stages = list(timings)
    response.milliseconds = [float(value) for value in timings.values()]
    return response


def reload_objects(
    response: Trigger.Response,
    engine: Engine,
    worker: NewestWorker[Any],
    tell: Progress,
    taken: Callable[[ObjectSet], None],
) -> Trigger.Response:
    """Fill in the response to a request to look at the mesh directory again.

    New and changed objects are onboarded on the calling thread, while the worker goes on with the stream;
    then it takes over all at once, between two frames.

    Args:
        engine, worker: as in :func:`estimate_poses`. tell: of the progress.
        taken: called on the worker's thread with the new objects.
    """
    old = engine.objects
    try:
        new = engine.look_again(tell)
    except PicoPoseError as error:
        response.message = f"nothing changed: {error}"
        return response

    def take() -> None:
        engine.take(new)
        taken(new)

    try:
        worker.call(take).result()
    except CancelledError:
        response.message = "nothing changed: the node was cleaned up or shut down meanwhile"
        return response
    response.success = not new.failed
    response.message = describe_change(old, new)
    return response
