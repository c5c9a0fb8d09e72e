"""A ROS 2 node that classifies images with an edgeres bundle: ``image`` and ``core`` need no ROS, ``node`` does."""
