"""The guide's curves: a copy that `python -m coar.planning.curve CSV` writes. Do not edit it by hand."""

from __future__ import annotations

SOURCE = "docs/benchmarks/cost_quality.csv"
TABLE = """\
network,components,ablate_fraction,estimator,budget,mean
cnn-736,736,0.1,gradient,2,0.929619
cnn-736,736,0.1,gradient,3,0.938462
cnn-736,736,0.1,gradient,5,0.946309
cnn-736,736,0.1,gradient,10,0.955356
cnn-736,736,0.1,gradient,20,0.960349
cnn-736,736,0.1,gradient,50,0.964965
cnn-736,736,0.1,gradient,100,0.966741
cnn-736,736,0.1,gradient,200,0.967643
cnn-736,736,0.1,"regression, ridge",500,0.753827
cnn-736,736,0.1,"regression, ridge",1000,0.911504
cnn-736,736,0.1,"regression, ridge",2000,0.950746
cnn-736,736,0.1,"regression, ridge",4000,0.96094
cnn-736,736,0.1,"regression, ridge",8000,0.965229
cnn-2208,2208,0.05,gradient,2,0.964476
cnn-2208,2208,0.05,gradient,3,0.970096
cnn-2208,2208,0.05,gradient,5,0.973884
cnn-2208,2208,0.05,gradient,10,0.977623
cnn-2208,2208,0.05,gradient,20,0.984199
cnn-2208,2208,0.05,gradient,50,0.988988
cnn-2208,2208,0.05,gradient,100,0.990628
cnn-2208,2208,0.05,gradient,200,0.991441
cnn-2208,2208,0.05,"regression, ridge",500,0.47706
cnn-2208,2208,0.05,"regression, ridge",1500,0.79786
cnn-2208,2208,0.05,"regression, ridge",3000,0.976594
cnn-2208,2208,0.05,"regression, ridge",4500,0.985012
vit-2304,2304,0.05,gradient,2,0.733876
vit-2304,2304,0.05,gradient,3,0.761931
vit-2304,2304,0.05,gradient,5,0.778572
vit-2304,2304,0.05,gradient,10,0.793851
vit-2304,2304,0.05,gradient,20,0.809182
vit-2304,2304,0.05,gradient,50,0.822153
vit-2304,2304,0.05,gradient,100,0.828704
vit-2304,2304,0.05,gradient,200,0.833467
vit-2304,2304,0.05,"regression, ridge",500,0.318083
vit-2304,2304,0.05,"regression, ridge",1000,0.443948
vit-2304,2304,0.05,"regression, ridge",2000,0.584478
vit-2304,2304,0.05,"regression, ridge",4000,0.710072
vit-2304,2304,0.05,"regression, ridge",8000,0.778464
"""
