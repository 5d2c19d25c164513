"""FCMAE pretraining on unlabelled images.

    timm-convnextv2 pretrain                                                    # the small demo data
    timm-convnextv2 pretrain --data-dir IMAGES --model fcmae_convnextv2_tiny --output runs
    torchrun --nproc-per-node 8 -m timm_convnextv2 pretrain --data-dir IMAGES ...    # a process per GPU

Options have the names that timm's train.py gives them, wherever it has the option. The result is
OUTPUT/EXPERIMENT/encoder, a timm folder that stock timm opens. `loop` is the page to read first and to change.
"""
