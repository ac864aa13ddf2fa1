"""Topics with QoS that can be overridden by parameters, and mismatches that are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.duration import Duration, Infinite
from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.exceptions import InvalidParameterTypeException
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import (
    DurabilityPolicy,
    LivelinessPolicy,
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)
from rclpy.qos_overriding_options import InvalidQosOverridesError, QoSOverridingOptions
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

from picopose_ros.errors import ConfigError
from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.drops import DropLog

POLICIES = (
    QoSPolicyKind.HISTORY,
    QoSPolicyKind.DEPTH,
    QoSPolicyKind.RELIABILITY,
    QoSPolicyKind.DURABILITY,
)
"""What ``qos_overrides.<topic>.<publisher|subscription>.<policy>`` parameters may change."""


_UNKNOWN = "_NODE_NAME_UNKNOWN_"


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
        callback: called with each message and its `MessageInfo`.
        depth: messages that may queue up.
        reliability: see above.
        given: a parameter decides over the reliability, see :func:`reliability_is_given`.

    Attributes:
        subscription: rclpy's; another one after :meth:`adapt`.

    Raises:
        ConfigError: a QoS override that can't be used.
    """

    def __init__(
        self,
        node: Node,
        message_type: type,
        topic: str,
        callback: Callable[[Any, Any], None],
        depth: int,
        reliability: str,
        given: bool = False,
    ) -> None:
        self._node = node
        self._message_type = message_type
        self._topic = topic
        self._callback = callback
        self._automatic = reliability == "auto" and not given
        start = ReliabilityPolicy.BEST_EFFORT if reliability == "best_effort" else ReliabilityPolicy.RELIABLE
        self._qos = QoSProfile(depth=depth, reliability=start)
        with _overrides(node.resolve_topic_name(topic)) as options:
            # The profile is changed in place to what the parameters say.
            self.subscription = self._create(options)

    @property
    def topic(self) -> str:
        """Full name of the topic, after remapping."""
        return self.subscription.topic_name

    @property
    def publishers(self) -> int:
        """How many publishers the topic has."""
        return self._node.count_publishers(self.topic)

    def adapt(self) -> bool:
        """Turn to best effort if a publisher needs it; whether that was done. To be called now and then."""
        if not self._automatic or not any(
            publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
            for publisher in self._node.get_publishers_info_by_topic(self.topic)
        ):
            return False
        self._automatic = False
        self._node.destroy_subscription(self.subscription)
        self._qos.reliability = ReliabilityPolicy.BEST_EFFORT
        self.subscription = self._create(None)
        self._node.get_logger().info(
            f"{self.topic} is published best effort: subscribing best effort too (large messages may be lost)"
        )
        return True

    def problems(self) -> list[str]:
        """What keeps messages of publishers that are there from coming; empty if nothing does."""
        own = self._message_type.__module__.split(".")[0] + "/msg/" + self._message_type.__name__
        problems = []
        for publisher in self._node.get_publishers_info_by_topic(self.topic):
            by = f"{self.topic} is published by {_name(publisher)}"
            offered = publisher.qos_profile
            if self._automatic and offered.reliability == ReliabilityPolicy.BEST_EFFORT:
                continue  # soon adapted to
            if publisher.topic_type != own:
                problems.append(
                    f"{by} as {publisher.topic_type}, but this node takes {own}: remap one of the two"
                )
            elif mismatch := _mismatch(offered, self._qos):
                problems.append(
                    f"{by} with a QoS that doesn't fit, so nothing of it is heard: {mismatch}: change it "
                    f"there, or here with qos_overrides.{self.topic}.subscription.<policy>"
                )
        return problems

    def destroy(self) -> None:
        """Stop listening."""
        self._node.destroy_subscription(self.subscription)

    def _create(self, options: QoSOverridingOptions | None) -> Subscription:
        return self._node.create_subscription(
            self._message_type,
            self._topic,
            self._callback,
            self._qos,
            event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            qos_overriding_options=options,
        )


@contextmanager
def counting_refusals(drops: DropLog, topic: str) -> Iterator[None]:
    """Count a message on a topic that the middleware refuses; nothing is raised."""
    try:
        yield
    except rclpy_implementation.RCLError as error:
        drops.record(
            DropReason.NOT_SENT,
            f"a message on {topic} was not sent, DDS refused it ({str(error).splitlines()[0]}): the machine "
            "is overloaded, a subscriber takes none of its messages, or ROS is being shut down",
        )


class OutputPublisher:
    """A publisher whose QoS can be overridden, and that tells who can't hear it.

    A message that the middleware refuses is counted, and what comes after it is sent all the same.

    Args:
        node: owner; a lifecycle node.
        drops: where refused messages are counted.
        message_type: of the topic.
        topic: name, remapped as usual.
        depth: messages that are kept for slow subscribers.
        managed: it publishes only while the node is active.
        latched: whoever subscribes later gets the last message (transient local).

    Raises:
        ConfigError: a QoS override that can't be used.
    """

    def __init__(
        self,
        node: LifecycleNode,
        drops: DropLog,
        message_type: type,
        topic: str,
        depth: int,
        managed: bool = True,
        latched: bool = False,
    ) -> None:
        self._node = node
        self._drops = drops
        self._managed = managed
        durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
        self._qos = QoSProfile(depth=depth, durability=durability)
        with _overrides(node.resolve_topic_name(topic)) as options:
            create = node.create_lifecycle_publisher if managed else node.create_publisher
            self._publisher: Publisher = create(
                message_type,
                topic,
                self._qos,
                event_callbacks=PublisherEventCallbacks(use_default_callbacks=False),
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
        with counting_refusals(self._drops, self.topic):
            self._publisher.publish(message)

    def destroy(self) -> None:
        """Leave the topic."""
        if self._managed:
            self._node.destroy_lifecycle_publisher(self._publisher)
        else:
            self._node.destroy_publisher(self._publisher)

    def problems(self) -> list[str]:
        """Who listens in vain; empty if nobody does."""
        return [
            f"{_name(subscriber)} subscribes to {self.topic} with a QoS that isn't offered, so it hears "
            f"nothing: {mismatch}: change it there, or here with "
            f"qos_overrides.{self.topic}.publisher.<policy>"
            for subscriber in self._node.get_subscriptions_info_by_topic(self.topic)
            if (mismatch := _mismatch(self._qos, subscriber.qos_profile))
        ]


# The graph is looked at, not the middleware's events: those come once, and some name no policy.


def _mismatch(offered: QoSProfile, asked: QoSProfile) -> str:
    """Why a publisher's messages don't reach a subscription; empty if they do."""
    fits, reason = qos_check_compatible(_explicit(offered), _explicit(asked))
    if fits != QoSCompatibility.ERROR:  # not `is`: the binding makes a new one each time
        return ""
    reason = ", ".join(part.strip() for part in reason.replace("ERROR:", "").split(";") if part.strip())
    return f"offered is {_policies(offered)}, asked for is {_policies(asked)} ({reason})"


def _explicit(qos: QoSProfile) -> QoSProfile:
    """The profile with what it leaves to the middleware filled in, as the graph tells of it.

    Else two that are the same would seem to differ.
    """
    unset = Duration()
    return QoSProfile(
        history=qos.history,
        depth=qos.depth,
        reliability=qos.reliability,
        durability=qos.durability,
        deadline=Infinite if qos.deadline == unset else qos.deadline,
        liveliness=LivelinessPolicy.AUTOMATIC
        if qos.liveliness == LivelinessPolicy.SYSTEM_DEFAULT
        else qos.liveliness,
        liveliness_lease_duration=Infinite
        if qos.liveliness_lease_duration == unset
        else qos.liveliness_lease_duration,
    )


def _policies(qos: QoSProfile) -> str:
    return f"{qos.reliability.name.lower()} and {qos.durability.name.lower()}"


def _name(endpoint: TopicEndpointInfo) -> str:
    if endpoint.node_name == _UNKNOWN:  # just discovered, or no ROS node at all
        return "a node without a name yet"
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"
