"""Topics with QoS that can be overridden by parameters, and mismatches that are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.callback_groups import CallbackGroup
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.exceptions import InvalidParameterTypeException
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import (
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import InvalidQosOverridesError, QoSOverridingOptions
from rclpy.subscription import Subscription

from picopose_ros.errors import ConfigError

POLICIES = (
    QoSPolicyKind.HISTORY,
    QoSPolicyKind.DEPTH,
    QoSPolicyKind.RELIABILITY,
    QoSPolicyKind.DURABILITY,
)
"""What ``qos_overrides.<topic>.<publisher|subscription>.<policy>`` parameters may change."""


def reliability_is_given(node: Node, topic: str) -> bool:
    """Whether a ``qos_overrides`` parameter was given for the reliability of a subscription.

    Only declaring it tells, which is undone; so this can be asked only before the subscription is made.
    """
    name = f"qos_overrides.{node.resolve_topic_name(topic)}.subscription.reliability"
    given = node.declare_parameter(name, None, ParameterDescriptor(dynamic_typing=True)).value
    node.undeclare_parameter(name)
    return given is not None


@contextmanager
def _overrides(topic: str) -> Iterator[QoSOverridingOptions]:
    """Options for one topic; an override that can't be used becomes a ConfigError."""
    try:
        yield QoSOverridingOptions(POLICIES)
    except (InvalidQosOverridesError, InvalidParameterTypeException, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"a parameter qos_overrides.{topic}... can't be used: {error}; see `ros2 param describe`"
        ) from error


class InputSubscription:
    """A subscription with reliability ``reliable``, ``best_effort`` or ``auto``.

    Large best-effort messages are mostly lost on the default transports, so reliable is the better choice,
    but it hears nothing from a publisher that offers best effort only, as many camera drivers do. ``auto``
    starts reliable and turns to best effort when such a publisher is discovered. A ``qos_overrides``
    parameter of the topic decides over all that.

    Args:
        node: owner.
        message_type: of the topic.
        topic: name, remapped as usual.
        callback: called with each message.
        depth: messages that may queue up.
        reliability: see above.
        given: a parameter decides over the reliability, see :func:`reliability_is_given`.
        group: in which callbacks run.

    Raises:
        ConfigError: a QoS override that can't be used.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any], None],
        depth: int,
        reliability: str,
        given: bool = False,
        group: CallbackGroup | None = None,
    ) -> None:
        self._node = node
        self._message_type = message_type
        self._topic = topic
        self._callback = callback
        self._group = group
        self._mismatch = ""
        self._to_adapt = False
        self._automatic = reliability == "auto" and not given
        start = ReliabilityPolicy.BEST_EFFORT if reliability == "best_effort" else ReliabilityPolicy.RELIABLE
        self._qos = QoSProfile(depth=depth, reliability=start)
        with _overrides(node.resolve_topic_name(topic)) as options:
            # The profile is changed in place to what the parameters say.
            self._subscription = self._create(options)

    @property
    def topic(self) -> str:
        """Full name of the topic, after remapping."""
        return self._subscription.topic_name

    @property
    def publishers(self) -> int:
        """How many publishers the topic has."""
        return self._node.count_publishers(self.topic)

    def adapt(self) -> None:
        """Turn to best effort if a publisher needs it; not to be called from the subscription's callbacks."""
        if not self._to_adapt:
            return
        self._to_adapt = self._automatic = False
        self._node.destroy_subscription(self._subscription)
        self._qos.reliability = ReliabilityPolicy.BEST_EFFORT
        self._subscription = self._create(None)
        self._node.get_logger().info(
            f"{self.topic} is published best effort: subscribing best effort too (large messages may be lost)"
        )

    def problem(self) -> str:
        """What keeps messages of a publisher that is there from coming; empty if nothing does."""
        own = self._message_type.__module__.split(".")[0] + "/msg/" + self._message_type.__name__
        for publisher in self._node.get_publishers_info_by_topic(self.topic):
            by = f"{self.topic} is published by {publisher.node_namespace.rstrip('/')}/{publisher.node_name}"
            if publisher.topic_type != own:
                return f"{by} as {publisher.topic_type}, but this node takes {own}: remap one of the two"
            fits, reason = qos_check_compatible(publisher.qos_profile, self._qos)
            if fits is QoSCompatibility.ERROR and not self._automatic:
                return (
                    f"{by} with a QoS that doesn't fit ({reason.strip() or self._mismatch}): change it "
                    f"there, or here with qos_overrides.{self.topic}.subscription.<policy>"
                )
        self._mismatch = ""
        return ""

    def destroy(self) -> None:
        """Stop listening."""
        self._node.destroy_subscription(self._subscription)

    def _create(self, options: QoSOverridingOptions | None) -> Subscription:
        return self._node.create_subscription(
            self._message_type,
            self._topic,
            self._callback,
            self._qos,
            callback_group=self._group,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=self._on_incompatible),
            qos_overriding_options=options,
        )

    def _on_incompatible(self, event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        if self._automatic and event.last_policy_kind == QoSPolicyKind.RELIABILITY:
            self._to_adapt = True
        elif not self._mismatch:
            self._mismatch = policy
            self._node.get_logger().warning(
                self.problem()
                or f"{self.topic} has a publisher whose QoS doesn't fit ({policy}): nothing comes from it"
            )


class OutputPublisher:
    """A publisher whose QoS can be overridden, and that tells who can't hear it.

    Args:
        node: owner; a lifecycle node.
        message_type: of the topic.
        topic: name, remapped as usual.
        depth: messages that are kept for slow subscribers.
        managed: it publishes only while the node is active.

    Raises:
        ConfigError: a QoS override that can't be used.
    """

    def __init__(
        self, node: LifecycleNode, message_type: type, topic: str, depth: int, managed: bool = True
    ) -> None:
        self._node = node
        self._mismatch = ""
        self._qos = QoSProfile(depth=depth)
        with _overrides(node.resolve_topic_name(topic)) as options:
            create = node.create_lifecycle_publisher if managed else node.create_publisher
            self._publisher: Publisher = create(
                message_type,
                topic,
                self._qos,
                event_callbacks=PublisherEventCallbacks(incompatible_qos=self._on_incompatible),
                qos_overriding_options=options,
            )

    @property
    def topic(self) -> str:
        """Full name of the topic, after remapping."""
        return self._publisher.topic_name

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return self._publisher.get_subscription_count() > 0

    def publish(self, message: Any) -> None:
        """Send a message; nothing happens where the publisher is managed and the node isn't active."""
        self._publisher.publish(message)

    def destroy(self) -> None:
        """Leave the topic."""
        self._node.destroy_lifecycle_publisher(self._publisher)

    def problem(self) -> str:
        """Who listens in vain, if anybody does."""
        if self._mismatch:
            for subscriber in self._node.get_subscriptions_info_by_topic(self.topic):
                fits, reason = qos_check_compatible(self._qos, subscriber.qos_profile)
                if fits is QoSCompatibility.ERROR:
                    name = f"{subscriber.node_namespace.rstrip('/')}/{subscriber.node_name}"
                    return (
                        f"{name} subscribes to {self.topic} with a QoS that isn't offered "
                        f"({reason.strip() or self._mismatch}) and hears nothing: change it there, or here "
                        f"with qos_overrides.{self.topic}.publisher.<policy>"
                    )
            self._mismatch = ""
        return ""

    def _on_incompatible(self, event: Any) -> None:
        told = bool(self._mismatch)
        self._mismatch = qos_policy_name_from_kind(event.last_policy_kind)
        if not told:
            self._node.get_logger().warning(
                self.problem()
                or f"a subscriber of {self.topic} asks for a QoS that isn't offered ({self._mismatch})"
            )
