"""The part of the soak that is run alone with ``--follow``: images are followed, masks come now and then."""

from __future__ import annotations

from statistics import median

from phases import PATIENCE, Soak, SoakError, memory_checks


def follow(soak: Soak, duration: float) -> None:
    """Images at a steady rate, the node follows: memory per minute, and how many images were answered.

    Args:
        duration: s.
    """
    client = soak.client
    publisher = soak.publisher()
    if not client.wait(lambda: publisher.new_stamps and client.answers, PATIENCE):
        raise SoakError("nothing was answered")
    before = len(client.answers)
    memory = soak.memory_over(duration)
    publisher.stop()
    answered, masks = len(client.answers) - before, len(publisher.new_stamps)
    image = soak.views[0].image
    soak.tell("load", f"{soak.image_rate:g} Hz images of {image.width}x{image.height} for {duration:.0f} s")
    soak.tell("segmentations of four segments", f"{masks} sent")
    soak.tell("images answered", f"{answered}, {answered / duration:.2f} Hz")
    soak.news()
    soak.tell("images followed", f"{client.latency('follow') or 0:.0f} ms, median")
    minutes = [
        f"{median(size for moment, size in memory if minute <= moment / 60 < minute + 1) / 2**20:.0f}"
        for minute in range(int(memory[-1][0] // 60) + 1)
    ]
    soak.tell("resident memory of each minute, median", f"{', '.join(minutes)} MiB")
    memory_checks(soak, memory)
