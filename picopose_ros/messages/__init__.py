"""ROS messages without ROS: the pixels of image messages, and rosbag2 recordings."""
