"""Every key that a config may have, once: its meaning, unit and default. Experiments only override.

The defaults are the reference's demo on 20BN-Jester: RViT with D 192, two layers, 36 frames of
112 x 112 pixels, and its training recipe. Letters: see `rvit_jax/shapes.py`.
"""

from ml_collections import ConfigDict


def get_config(variant: str | None = None) -> ConfigDict:
    """Returns the base config; the other files of this folder change what differs.

    Raises:
        ValueError: a variant is asked for; there is none.
    """
    if variant is not None:
        raise ValueError(f"configs/base.py has no variant {variant!r}")
    config = ConfigDict()
    # A model to start from: a workdir, a checkpoint folder, a converted model, or the weights of a
    # plain ViT as FILE.safetensors (timm's or Hugging Face's names); "": none. Classes, frame size,
    # patches and layers may be others; what was taken over is printed. With a converted training
    # checkpoint of PyTorch of the same model, the run goes on where PyTorch stopped.
    config.init_from = ""
    # "O0": float32 | "O1": bfloat16 tokens and matrix products, float32 parameters | "O2": bfloat16
    # parameters too, with a float32 copy in the optimizer. State, sums and norms stay float32.
    config.opt_level = "O0"
    config.seed = 8415  # of initial weights, shuffling and dropout; 0 to 2^32 - 1

    config.model = ConfigDict()
    config.model.image_size = 112  # H = W: pixels a side of the square frames that the model sees
    config.model.patch_size = 8  # P: pixels a side of a patch; divides image_size
    config.model.hidden_size = 192  # D: width of every token; num_heads divides it
    config.model.num_layers = 2  # L
    config.model.num_heads = 8  # A
    config.model.mlp_dim = 768  # width inside each block's MLP
    config.model.num_classes = 27  # K
    config.model.attention = "linear"  # "linear" | "softmax" | "reattention"
    config.model.readout = "class_token"  # "class_token" | "class_and_hidden_tokens"
    config.model.head = "linear"  # "linear": LayerNorm, Linear | "mlp": MLP, Linear
    # Carry the re-attention parameters that the later PyTorch source creates and never uses, so
    # that its checkpoints convert there and back without loss. They take no part in anything.
    config.model.unused_reattention = False
    # What a layer's state becomes. True: a + g, the positions stay in it (the reference's source);
    # False: a + h, they do not. Other PyTorch files may compute it so.
    config.model.state_keeps_positions = True
    # Token 0 of the state before the first frame: True: learned (the reference); False: zeros.
    config.model.learned_hidden_token = True
    config.model.dropout_rate = 0.0  # on x + positions, at every layer of every frame
    config.model.block_dropout_rate = 0.1  # on the attention output, in the MLPs, in the mlp head

    # What training keeps for the gradient; the rest is computed again. "none" drops nothing |
    # "dots": matrix products and dropout's masks | "frames": the state between frames |
    # "layers": that too, and of a frame one layer at a time.
    config.model.remat = "dots"
    # The order in which a clip is computed: "frames": frame by frame through all layers | "layers":
    # layer by layer over many frames | "auto": the one measured to be faster. The same numbers.
    config.model.schedule = "auto"
    # A longer clip is read in segments of so many frames: in training, the memory is that of one
    # segment, and each is computed once more.
    config.model.segment_frames = 36

    config.dataset = ConfigDict()
    # "jester": folders of frames | "jester_tfds": what scripts/prepare_jester.py made of them or of
    # the download's parts | "gestures": generated; drawn when absent | of video files:
    # "video_folder" (<split>/<class>/<video>), "video_list" (a CSV or JSON lines per split),
    # "ssv2", "kinetics400", "charades".
    config.dataset.name = "jester"
    config.dataset.data_dir = "data/jester"  # holds the frame folders and the CSV files
    # Of video files: where the annotations lie inside data_dir, a folder or a path with {split} for
    # the split's name; "": the usual places.
    config.dataset.labels = ""
    # Of video files: "fail": each must be there | "skip": those that are not are left out, counted.
    config.dataset.missing = "fail"
    config.dataset.classes = ()  # class names in index order; () = Jester's 27, or the data's
    config.dataset.num_frames = 36  # T: frames of a clip
    config.dataset.frame_stride = 1  # source frames from one frame of a clip to the next
    config.dataset.frame_rate = 12.0  # source frames a second: how fast prediction takes them
    # "head": frames 0, k, 2k, ... of the video, k = frame_stride (the reference) | "dense": the
    # same from a beginning drawn anew, in evaluation from the middle | "uniform": a frame from the
    # middle of each of num_frames equal parts | "random": in training drawn within each part.
    config.dataset.sampling = "head"
    # How frames become squares. "squash": the whole frame, whatever its shape (the reference) |
    # "short_side": its shape kept, the longer side cut: at random in training, else its middle.
    config.dataset.resize = "squash"
    # How frames are resized. "pillow": pixel for pixel the reference's | "fast": OpenCV, in a
    # fraction of the time; frames of Jester's size differ by 0.4 (clean) to 1.2 (grainy) of 255 in
    # the mean. Belongs to the trained model.
    config.dataset.decoder = "pillow"
    # A video with fewer than num_frames frames: "repeat_last" repeats its last frame (the
    # reference); "ragged" stops there: the model reads `num_frames` of each clip.
    config.dataset.short_clips = "repeat_last"
    # For training on "ragged" clips: batches of clips of about one length, as many frames long as
    # the first of these numbers that holds its longest clip; above the last, num_frames. (16, 24)
    # makes batches of 16, 24 and num_frames frames. (): num_frames for all, in wholly random order.
    config.dataset.length_buckets = ()
    # "rgb": real frames | "channel_planes": the reference's scrambled layout.
    # Deviation: the reference knows the second alone; it is no video, and cannot stream.
    config.dataset.frame_packing = "rgb"
    # A control for evaluation, "forward" otherwise. "shuffled": the clip's frames in random order;
    # "single": one of them, drawn uniformly, in place of all. Both leave no direction of time.
    config.dataset.frame_order = "forward"
    # Threads (0) or this many worker processes decode. Order and clips do not depend on it.
    config.dataset.num_workers = 0
    # Seconds that worker processes may take for one batch, their start included; then the run stops
    # with an error. 0: they are waited for without end.
    config.dataset.timeout_s = 600.0
    # A clip that cannot be read: "fail" stops and names it | "skip" leaves it out (its row is
    # masked, later clips keep their place), warns, and counts it in every record.
    config.dataset.on_error = "fail"
    # Keep decoded clips in memory after their first use (num_workers = 0 only). Bytes needed:
    # clips x num_frames x image_size^2 x 3.
    config.dataset.cache = False
    # What dataset.name = "gestures" draws where data_dir holds no finished set: clips of each
    # split, and a seed. A set that lies there is used as it is.
    config.dataset.generate = ConfigDict()
    config.dataset.generate.train = 0
    config.dataset.generate.validation = 0
    config.dataset.generate.test = 0
    config.dataset.generate.seed = 0

    # Random changes of training clips, drawn once per clip for all its frames; all off.
    config.dataset.augment = ConfigDict()
    augment = config.dataset.augment
    augment.random_resized_crop = ConfigDict()
    augment.random_resized_crop.scale = (1.0, 1.0)  # share of the frame's area: lowest, highest
    augment.random_resized_crop.aspect = (1.0, 1.0)  # width / height: lowest, highest
    augment.scale_jitter = (1.0, 1.0)  # zoom: above 1 shows less; below 1 leaves grey around
    augment.horizontal_flip = 0.0  # probability; the class becomes the mirrored one
    # "auto": by the class names (Jester, Something-Something) | "jester" | "something_something" |
    # "unchanged": no class depends on left and right (Kinetics, Charades).
    augment.mirror_classes = "auto"
    augment.time_reversal = 0.0  # probability; the class becomes the reversed one; Jester's only
    augment.frame_rate_jitter = (1.0, 1.0)  # how much faster the clip plays: lowest, highest
    augment.colour_jitter = ConfigDict()  # factors from 1 - strength to 1 + strength
    augment.colour_jitter.brightness = 0.0
    augment.colour_jitter.contrast = 0.0
    augment.colour_jitter.saturation = 0.0
    augment.colour_jitter.hue = 0.0  # turned by up to this share of the circle; at most 0.5
    augment.rand_augment = ConfigDict()
    augment.rand_augment.num_ops = 0  # operations per clip
    augment.rand_augment.magnitude = 7.0  # 0 to 10
    augment.random_erasing = ConfigDict()
    augment.random_erasing.probability = 0.0
    augment.random_erasing.area = (0.02, 0.33)  # share of the frame: lowest, highest
    augment.mixup_alpha = 0.0  # of Beta(alpha, alpha); 0 = off; with cutmix a coin decides per clip
    augment.cutmix_alpha = 0.0

    # Evaluation reads each clip so often and averages the answers: from so many places in time
    # (sampling "dense", "uniform" or "random"), with so many crops (resize "short_side").
    config.views = ConfigDict()
    config.views.temporal = 1
    config.views.spatial = 1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # "adamw" | "adam" | "sgd" | "lamb"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.betas = (0.9, 0.999)  # of Adam and LAMB; the first one is SGD's momentum
    config.optimizer.weight_decay = 0.01  # decoupled (AdamW, LAMB), on every parameter
    # "step": x step_factor every step_epochs, after a warm-up in powers of ten (the reference)
    # | "cosine": linear warm-up, then a half cosine to 0, per step | "constant".
    config.optimizer.schedule = "step"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.step_epochs = 10
    config.optimizer.step_factor = 0.8
    config.optimizer.clip_norm = 0.0  # clip gradients at this global norm; 0 = never
    config.optimizer.frozen = ()  # parameter paths, as patterns ("patch_embedding/*"), kept as is
    # Each layer's updates are multiplied by this once more than those of the layer above: the
    # head's by 1, the last layer's by it, the embeddings' by its power L + 1. 1 = off.
    config.optimizer.layer_decay = 1.0
    # A step's batch is processed in so many equal parts, one after the other, in the memory of one;
    # the gradient is that of the whole. Divides batch_size.
    config.optimizer.accumulation_steps = 1

    config.loss = ConfigDict()
    # "smoothed_cross_entropy" | "cross_entropy" | "binary_cross_entropy": each class for itself,
    # where a clip may have several.
    config.loss.name = "smoothed_cross_entropy"
    # Probability spread evenly over all K classes, by the smoothed loss; no other knows it.
    config.loss.label_smoothing = 0.1

    # An average of the parameters over the steps: ema = d ema + (1 - d) parameters, kept and
    # evaluated beside them; 0 = none. It is loaded from the folder WORKDIR/checkpoints/STEP/ema.
    config.ema_decay = 0.0
    # A step whose loss or gradient is not finite changes nothing. "stop": the run ends with an
    # error that names its clips | "skip": it goes on, and every record counts skipped_updates.
    config.on_nonfinite = "stop"

    config.batch_size = 32  # B: clips of one step, over all devices
    # The devices, of all processes: data x fsdp of them share each batch equally.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all that fsdp leaves over
    config.mesh.fsdp = 1  # large parameters and their optimizer state are cut in so many parts
    config.num_epochs = 1000
    config.evaluate_every_epochs = 1  # on the validation split
    config.test_after_training = False  # evaluate the best checkpoint on the (labelled) test split
    config.checkpoint_every_steps = 0  # besides one checkpoint after every evaluation; 0 = none
    config.keep_checkpoints = 3  # the latest so many; the best one is always kept
    return config


def get_large_config(*, xl: bool) -> ConfigDict:
    """What the experiments on large sets of video files share: RViT-XL, or else RViT-L.

    The sizes are derived from the paper's figures (72.0 M and 107.7 M parameters on 174 classes);
    optimizer, schedule and epochs are not in it and are ours. Made for 8 GPUs of 80 GB.
    """
    config = get_config()
    config.model.image_size = 224
    config.model.patch_size = 16
    config.model.hidden_size = 768
    config.model.num_layers = 12 if xl else 8
    config.model.num_heads = 12
    config.model.mlp_dim = 3072
    config.model.remat = "frames"

    config.dataset.num_frames = 64 if xl else 32
    config.dataset.resize = "short_side"
    config.dataset.augment.horizontal_flip = 0.5  # labels that name a side change theirs
    config.dataset.num_workers = 16
    config.views.spatial = 3

    config.optimizer.weight_decay = 0.05
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.clip_norm = 1.0

    config.batch_size = 64
    config.num_epochs = 50
    return config
