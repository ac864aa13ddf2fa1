"""Images per second with several followed objects: ``python scripts/follow_speed.py``.

Follows instances of the demo through its recording, as the node does but without ROS. It begins from the
poses that the first image's masks give.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from picopose_ros.libraries import settle_threads


def main() -> None:
    """Measure and print a row per number of objects."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="the demo's folder (build/demo)")
    parser.add_argument("--objects", type=int, nargs="+", default=(1, 2, 4, 7), help="how many (1 2 4 7)")
    parser.add_argument("--images", type=int, default=30, help="of the recording (30)")
    parser.add_argument("--threads", type=int, default=0, help="of torch (0: as many as the node would take)")
    args = parser.parse_args()
    settle_threads()  # as the node does, before NumPy is loaded
    import numpy as np
    import torch

    from picopose_ros.demo.world import (
        CAMERA,
        IMAGE_TOPIC,
        SEGMENTATION_TOPIC,
        build_world,
    )
    from picopose_ros.estimation.follow import Follower, Verdict
    from picopose_ros.estimation.threads import choose_threads
    from picopose_ros.estimator import PoseEstimator
    from picopose_ros.messages import bags
    from picopose_ros.messages.images import image_to_rgb
    from picopose_ros.messages.segmentations import segments_from_message

    args.out.mkdir(parents=True, exist_ok=True)
    files = build_world(args.out)
    estimator = PoseEstimator.from_mesh_dir(files.meshes, cache_dir=args.out / "cache", hypotheses=2)
    with bags.BagReader(files.bag) as reader:
        images = [image_to_rgb(m, IMAGE_TOPIC) for _, _, m in reader.messages([IMAGE_TOPIC])][: args.images]
        _, _, message = next(iter(reader.messages([SEGMENTATION_TOPIC])))
    segments = segments_from_message(message, CAMERA.height, CAMERA.width, SEGMENTATION_TOPIC)[0]
    if args.threads:
        torch.set_num_threads(args.threads)
    else:
        choose_threads(lambda: estimator.estimate(images[0], CAMERA, segments[:1]))
    print(f"{torch.get_num_threads()} threads", flush=True)
    print("| objects | answered | ms per image | of the processor | images per second |")
    print("| --- | --- | --- | --- | --- |")
    for count in args.objects:
        follower = Follower(estimator)
        found = estimator.estimate(images[0], CAMERA, segments[:count]).poses
        follower.see_all(found, 0.0, 0.3, None, (images[0], CAMERA))
        spent, shown = [], 0
        for n, rgb in enumerate(images[1:], 1):
            started, busy = time.perf_counter(), time.process_time()
            result = follower.step(rgb, CAMERA, 0.1 * n)
            spent.append((time.perf_counter() - started, time.process_time() - busy))
            shown += sum(one.verdict is not Verdict.LOST for one in result)
        share, (mean, busy) = shown / (count * len(spent)), 1e3 * np.mean(spent, 0)
        print(f"| {count} | {share:.2f} | {mean:.0f} | {busy:.0f} | {1e3 / mean:.1f} |", flush=True)


if __name__ == "__main__":
    main()
