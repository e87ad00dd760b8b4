"""What experiments on networks trained on ImageNet share: photos of a folder, which are right, and disjoint splits."""
