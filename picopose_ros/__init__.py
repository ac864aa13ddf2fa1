"""6D poses of objects a robot has never trained on, from one RGB camera, in ROS 2."""

from pkgutil import extend_path

# The generated ROS messages live in a package of the same name (picopose_ros.msg, .srv, .action),
# installed elsewhere on the path when this source tree is imported directly.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
