"""From messages to answers, without ROS: what the node, its services and ``picopose bag`` have in common.

``frames.py`` reads an image, its camera_info and its segmentation (``segmentations.py``); ``answers.py``
sorts the poses by score and names their TF frames; ``build.py`` builds the messages that are published. A
message is any object with the fields of its type: rclpy's and those of the `rosbags` library both are. What
can't be used is reported with one of the reasons of ``reasons.py``.
"""
