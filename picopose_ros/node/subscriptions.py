"""Subscriptions that find out by themselves whether their publisher is reliable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription


class InputSubscription:
    """A subscription with reliability ``reliable``, ``best_effort`` or ``auto``.

    Large best-effort messages are mostly lost on the default transports, so reliable is the better choice,
    but it hears nothing from a publisher that offers best effort only, as many camera drivers do. ``auto``
    starts reliable and turns to best effort when such a publisher is discovered.

    Args:
        node: owner.
        message_type: of the topic.
        topic: name, remapped as usual.
        callback: called with each message.
        depth: messages that may queue up.
        reliability: see above.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any], None],
        depth: int,
        reliability: str,
    ) -> None:
        self._node = node
        self._message_type = message_type
        self._topic = topic
        self._callback = callback
        self._depth = depth
        self._automatic = reliability == "auto"
        self._mismatch = False
        self._subscription = self._create(
            ReliabilityPolicy.BEST_EFFORT if reliability == "best_effort" else ReliabilityPolicy.RELIABLE
        )

    @property
    def topic(self) -> str:
        """Full name of the topic, after remapping."""
        return self._subscription.topic_name

    def adapt(self) -> None:
        """Turn to best effort if a publisher needs it; not to be called from the subscription's callbacks."""
        if not self._mismatch:
            return
        self._mismatch = False
        self._automatic = False
        self._node.destroy_subscription(self._subscription)
        self._subscription = self._create(ReliabilityPolicy.BEST_EFFORT)
        self._node.get_logger().info(
            f"{self.topic} is published best effort: subscribing best effort too (large messages may be lost)"
        )

    def destroy(self) -> None:
        """Stop listening."""
        self._node.destroy_subscription(self._subscription)

    def _create(self, reliability: ReliabilityPolicy) -> Subscription:
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=self._depth,
            reliability=reliability,
            durability=DurabilityPolicy.VOLATILE,
        )
        # Without a callback of ours rclpy logs the mismatch by itself, which is right where nothing adapts.
        events = SubscriptionEventCallbacks(
            incompatible_qos=self._on_incompatible if self._automatic else None
        )
        return self._node.create_subscription(
            self._message_type, self._topic, self._callback, qos, event_callbacks=events
        )

    def _on_incompatible(self, _: Any) -> None:
        self._mismatch = True
