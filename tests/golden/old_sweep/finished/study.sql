BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE prefsweep_attempt (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	gpus FLOAT NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (sweep, trial, attempt)
);
INSERT INTO "prefsweep_attempt" VALUES('finished',0,1,1.79586707868710088731e+09,1.0,2.04694075740007974673e+01);
INSERT INTO "prefsweep_attempt" VALUES('finished',1,1,1.79586709922267246243e+09,1.0,5.8222847700017155148e-01);
INSERT INTO "prefsweep_attempt" VALUES('finished',2,1,1.79586709984281277653e+09,1.0,5.77422628999556764028e-01);
INSERT INTO "prefsweep_attempt" VALUES('finished',3,1,1.7958671005408475399e+09,1.0,3.26344488999893656e-01);
INSERT INTO "prefsweep_attempt" VALUES('finished',4,1,1.79586715149968481064e+09,1.0,1.76489687119992595394e+01);
CREATE TABLE prefsweep_driver (
	sweep VARCHAR(64) NOT NULL, 
	driver INTEGER NOT NULL, 
	holder TEXT NOT NULL, 
	at FLOAT NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (sweep, driver)
);
INSERT INTO "prefsweep_driver" VALUES('finished',1,'pid 16826 on old-machine, process b36f0986-7a93-428b-8a29-75be45ea639d/pid:[4026531836]/1268346',1.7958670608139464855e+09,4.00712606500001129478e+01);
INSERT INTO "prefsweep_driver" VALUES('finished',2,'pid 17941 on old-machine, process b36f0986-7a93-428b-8a29-75be45ea639d/pid:[4026531836]/1275629',1.795867135726887703e+09,3.35263449329995637531e+01);
CREATE TABLE prefsweep_event (
	sweep VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	trial INTEGER, 
	kind VARCHAR(64) NOT NULL, 
	text TEXT NOT NULL, 
	PRIMARY KEY (sweep, seq)
);
INSERT INTO "prefsweep_event" VALUES('finished',1,1.7958670607597913742e+09,NULL,'created','sweep finished');
INSERT INTO "prefsweep_event" VALUES('finished',2,1.79586706081485319138e+09,NULL,'driver','pid 16826 on old-machine drives');
INSERT INTO "prefsweep_event" VALUES('finished',3,1.79586707866725420949e+09,0,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('finished',4,1.79586709915939140322e+09,0,'complete','');
INSERT INTO "prefsweep_event" VALUES('finished',5,1.79586709916974186893e+09,0,'worker','worker.answers_computed=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=17580 worker.start_computed=1 worker.trials=1');
INSERT INTO "prefsweep_event" VALUES('finished',6,1.79586709921967077252e+09,1,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('finished',7,1.79586709981221270566e+09,1,'complete','');
INSERT INTO "prefsweep_event" VALUES('finished',8,1.79586709981927132606e+09,1,'worker','worker.answers_computed=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=17580 worker.start_computed=1 worker.trials=2 worker.weights_restored=1');
INSERT INTO "prefsweep_event" VALUES('finished',9,1.79586709983677554128e+09,2,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('finished',10,1.79586710042209291458e+09,2,'complete','');
INSERT INTO "prefsweep_event" VALUES('finished',11,1.79586710042842602735e+09,2,'worker','worker.answers_computed=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=17580 worker.start_computed=1 worker.trials=3 worker.weights_restored=2');
INSERT INTO "prefsweep_event" VALUES('finished',12,1.79586710053862023354e+09,3,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('finished',13,1.79586710086840462682e+09,3,'complete','');
INSERT INTO "prefsweep_event" VALUES('finished',14,1.79586710087593960758e+09,3,'worker','worker.answers_computed=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=17580 worker.start_computed=1 worker.trials=4 worker.weights_restored=3');
INSERT INTO "prefsweep_event" VALUES('finished',15,1.79586711273247575759e+09,NULL,'enqueued','enqueued by user@old-machine, pid 17934');
INSERT INTO "prefsweep_event" VALUES('finished',16,1.79586713572832465174e+09,NULL,'driver','pid 17941 on old-machine drives');
INSERT INTO "prefsweep_event" VALUES('finished',17,1.7958671514832816124e+09,4,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('finished',18,1.79586716916798663137e+09,4,'complete','');
INSERT INTO "prefsweep_event" VALUES('finished',19,1.79586716919156789778e+09,4,'worker','worker.answers_loaded=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=18792 worker.start_loaded=1 worker.trials=1');
CREATE TABLE prefsweep_fork (
	sweep VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	place VARCHAR(64) NOT NULL, 
	PRIMARY KEY (sweep, seq)
);
CREATE TABLE prefsweep_given (
	sweep VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	leaves TEXT NOT NULL, 
	origin TEXT NOT NULL, 
	by_hand BOOLEAN NOT NULL, 
	parent INTEGER, 
	trial INTEGER, 
	PRIMARY KEY (sweep, seq)
);
INSERT INTO "prefsweep_given" VALUES('finished',1,1.7958671127314226627e+09,'{"loss.beta": 3}','enqueued by user@old-machine, pid 17934',1,NULL,4);
CREATE TABLE prefsweep_judged (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	at FLOAT NOT NULL, 
	verdict TEXT NOT NULL, 
	PRIMARY KEY (sweep, trial, "key")
);
CREATE TABLE prefsweep_pairs (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	pairs TEXT NOT NULL, 
	PRIMARY KEY (sweep, trial, step)
);
CREATE TABLE prefsweep_point (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	metrics TEXT NOT NULL, 
	PRIMARY KEY (sweep, trial, step)
);
INSERT INTO "prefsweep_point" VALUES('finished',0,0,'{"eval_loss": 1.4533793529820798, "eval_rewards/chosen": -66.59422605736054, "eval_rewards/rejected": -66.6332881336128, "eval_rewards/margins": 0.039062076252258215, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659422605736054, "eval_logps/rejected": -6.6633288133612805, "eval_nll_loss": 6.636226889666389, "eval_margins/logp": 0.003906207625225977, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659422605736054, "eval_logps_per_token/rejected": -6.6633288133612805, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',0,3,'{"loss": 4.714598545361822, "rewards/chosen": -71.35134993149684, "rewards/rejected": -67.42361198094758, "rewards/margins": -3.9277379505492576, "rewards/accuracies": 0.25, "logps/chosen": -7.135134993149684, "logps/rejected": -6.742361198094758, "nll_loss": 7.074065715074539, "margins/logp": -0.3927737950549257, "accuracies/logp": 0.25, "logps_per_token/chosen": -7.135134993149684, "logps_per_token/rejected": -6.742361198094758, "lengths/chosen": 8.0, "lengths/rejected": 11.25, "tokens_per_second": 13215.535777771829, "grad_norm": 12.03192138671875, "learning_rate": 0.0009045084971874737, "pairs_per_second": 369.66533644117004, "epoch": 0.1875, "eval_loss": 1.4276803687166433, "eval_rewards/chosen": -66.59795611978689, "eval_rewards/rejected": -66.61461425169628, "eval_rewards/margins": 0.016658131909405682, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659795611978689, "eval_logps/rejected": -6.661461425169629, "eval_nll_loss": 6.635715063880472, "eval_margins/logp": 0.0016658131909405016, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659795611978689, "eval_logps_per_token/rejected": -6.661461425169629, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',0,2,'{"loss": 1.053370952216617, "rewards/chosen": -68.49951692918937, "rewards/rejected": -68.85199598660544, "rewards/margins": 0.3524790574160832, "rewards/accuracies": 0.5, "logps/chosen": -6.849951692918936, "logps/rejected": -6.885199598660544, "nll_loss": 6.775345170497895, "margins/logp": 0.03524790574160819, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.849951692918936, "logps_per_token/rejected": -6.885199598660544, "lengths/chosen": 10.0, "lengths/rejected": 9.75, "tokens_per_second": 10448.051904322505, "grad_norm": 11.52237319946289, "learning_rate": 0.001, "pairs_per_second": 276.76958686947034, "epoch": 0.125}');
INSERT INTO "prefsweep_point" VALUES('finished',0,1,'{"loss": 1.6939192893387478, "rewards/chosen": -67.25747167094472, "rewards/rejected": -68.55639404342288, "rewards/margins": 1.298922372478156, "rewards/accuracies": 0.5, "logps/chosen": -6.725747167094473, "logps/rejected": -6.855639404342288, "nll_loss": 6.773893787747338, "margins/logp": 0.1298922372478155, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.725747167094473, "logps_per_token/rejected": -6.855639404342288, "lengths/chosen": 10.5, "lengths/rejected": 6.75, "tokens_per_second": 6556.325324868761, "grad_norm": 14.362062454223633, "learning_rate": 0.0, "pairs_per_second": 176.00873355352377, "epoch": 0.0625}');
INSERT INTO "prefsweep_point" VALUES('finished',0,6,'{"loss": 1.1257872425993933, "rewards/chosen": -67.34305612968676, "rewards/rejected": -69.03613125284514, "rewards/margins": 1.6930751231583692, "rewards/accuracies": 0.5, "logps/chosen": -6.734305612968676, "logps/rejected": -6.903613125284513, "nll_loss": 6.709725079329117, "margins/logp": 0.16930751231583696, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.734305612968676, "logps_per_token/rejected": -6.903613125284513, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 10830.367096222351, "grad_norm": 10.915966033935547, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 285.00966042690396, "epoch": 0.375, "eval_loss": 1.4234789376742571, "eval_rewards/chosen": -66.58862814827404, "eval_rewards/rejected": -66.60331831379065, "eval_rewards/margins": 0.0146901655166074, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658862814827405, "eval_logps/rejected": -6.660331831379066, "eval_nll_loss": 6.634599152733298, "eval_margins/logp": 0.0014690165516605402, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658862814827405, "eval_logps_per_token/rejected": -6.660331831379066, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',0,5,'{"loss": 0.4043663252923799, "rewards/chosen": -66.90235575040182, "rewards/rejected": -69.26600188324376, "rewards/margins": 2.3636461328419447, "rewards/accuracies": 0.75, "logps/chosen": -6.690235575040182, "logps/rejected": -6.926600188324376, "nll_loss": 6.716065230576889, "margins/logp": 0.2363646132841941, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.690235575040182, "logps_per_token/rejected": -6.926600188324376, "lengths/chosen": 11.5, "lengths/rejected": 9.25, "tokens_per_second": 8480.987836451033, "grad_norm": 8.10428237915039, "learning_rate": 0.00034549150281252633, "pairs_per_second": 242.31393818431522, "epoch": 0.3125}');
INSERT INTO "prefsweep_point" VALUES('finished',0,4,'{"loss": 0.5580076979737154, "rewards/chosen": -66.2942193434352, "rewards/rejected": -67.72071188688278, "rewards/margins": 1.4264925434475835, "rewards/accuracies": 0.75, "logps/chosen": -6.62942193434352, "logps/rejected": -6.772071188688279, "nll_loss": 6.629797137867321, "margins/logp": 0.1426492543447586, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.62942193434352, "logps_per_token/rejected": -6.772071188688279, "lengths/chosen": 13.75, "lengths/rejected": 11.75, "tokens_per_second": 17490.637444273318, "grad_norm": 8.07724380493164, "learning_rate": 0.0006545084971874737, "pairs_per_second": 426.600913274959, "epoch": 0.25}');
INSERT INTO "prefsweep_point" VALUES('finished',1,0,'{"eval_loss": 1.7282479425605617, "eval_rewards/chosen": -66.59422605736054, "eval_rewards/rejected": -66.6332881336128, "eval_rewards/margins": 0.039062076252258215, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659422605736054, "eval_logps/rejected": -6.6633288133612805, "eval_nll_loss": 6.636226889666389, "eval_margins/logp": 0.003906207625225977, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659422605736054, "eval_logps_per_token/rejected": -6.6633288133612805, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',1,3,'{"loss": 5.126683334448012, "rewards/chosen": -71.34833642611137, "rewards/rejected": -67.42315403052739, "rewards/margins": -3.925182395583981, "rewards/accuracies": 0.25, "logps/chosen": -7.134833642611137, "logps/rejected": -6.742315403052738, "nll_loss": 7.073779106140137, "margins/logp": -0.39251823955839815, "accuracies/logp": 0.25, "logps_per_token/chosen": -7.134833642611137, "logps_per_token/rejected": -6.742315403052738, "lengths/chosen": 8.0, "lengths/rejected": 11.25, "tokens_per_second": 4858.894146200292, "grad_norm": 12.501455307006836, "learning_rate": 0.0009045084971874737, "pairs_per_second": 135.91312297063754, "epoch": 0.1875, "eval_loss": 1.713275083049122, "eval_rewards/chosen": -66.59467844011212, "eval_rewards/rejected": -66.60648715967959, "eval_rewards/margins": 0.011808719567462767, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.659467844011212, "eval_logps/rejected": -6.660648715967958, "eval_nll_loss": 6.635322194940904, "eval_margins/logp": 0.001180871956745988, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.659467844011212, "eval_logps_per_token/rejected": -6.660648715967958, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',1,2,'{"loss": 1.3491535549712834, "rewards/chosen": -68.49951692918937, "rewards/rejected": -68.85199598660544, "rewards/margins": 0.3524790574160832, "rewards/accuracies": 0.5, "logps/chosen": -6.849951692918936, "logps/rejected": -6.885199598660544, "nll_loss": 6.775345170497895, "margins/logp": 0.03524790574160819, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.849951692918936, "logps_per_token/rejected": -6.885199598660544, "lengths/chosen": 10.0, "lengths/rejected": 9.75, "tokens_per_second": 10760.672662976733, "grad_norm": 12.923924446105957, "learning_rate": 0.001, "pairs_per_second": 285.05093146958234, "epoch": 0.125}');
INSERT INTO "prefsweep_point" VALUES('finished',1,1,'{"loss": 1.9958416506244006, "rewards/chosen": -67.25747167094472, "rewards/rejected": -68.55639404342288, "rewards/margins": 1.298922372478156, "rewards/accuracies": 0.5, "logps/chosen": -6.725747167094473, "logps/rejected": -6.855639404342288, "nll_loss": 6.773893787747338, "margins/logp": 0.1298922372478155, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.725747167094473, "logps_per_token/rejected": -6.855639404342288, "lengths/chosen": 10.5, "lengths/rejected": 6.75, "tokens_per_second": 14895.233523875491, "grad_norm": 15.34662914276123, "learning_rate": 0.0, "pairs_per_second": 399.8720409094092, "epoch": 0.0625}');
INSERT INTO "prefsweep_point" VALUES('finished',1,6,'{"loss": 1.4038419140484475, "rewards/chosen": -67.33671315648684, "rewards/rejected": -69.0224980711937, "rewards/margins": 1.6857849147068649, "rewards/accuracies": 0.5, "logps/chosen": -6.733671315648683, "logps/rejected": -6.902249807119369, "nll_loss": 6.709186699079431, "margins/logp": 0.16857849147068626, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.733671315648683, "logps_per_token/rejected": -6.902249807119369, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 6774.643791850213, "grad_norm": 11.955209732055664, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 178.28009978553195, "epoch": 0.375, "eval_loss": 1.7113800037610396, "eval_rewards/chosen": -66.58337253090153, "eval_rewards/rejected": -66.59323363487272, "eval_rewards/margins": 0.009861103971190666, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658337253090153, "eval_logps/rejected": -6.659323363487273, "eval_nll_loss": 6.63400161967558, "eval_margins/logp": 0.0009861103971190444, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658337253090153, "eval_logps_per_token/rejected": -6.659323363487273, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',1,5,'{"loss": 0.5427907488288286, "rewards/chosen": -66.9047974121003, "rewards/rejected": -69.26718742932593, "rewards/margins": 2.3623900172256285, "rewards/accuracies": 0.75, "logps/chosen": -6.69047974121003, "logps/rejected": -6.926718742932592, "nll_loss": 6.716179153193599, "margins/logp": 0.23623900172256285, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.69047974121003, "logps_per_token/rejected": -6.926718742932592, "lengths/chosen": 11.5, "lengths/rejected": 9.25, "tokens_per_second": 6022.920050354293, "grad_norm": 9.231921195983887, "learning_rate": 0.00034549150281252633, "pairs_per_second": 172.08343001012267, "epoch": 0.3125}');
INSERT INTO "prefsweep_point" VALUES('finished',1,4,'{"loss": 0.7573919595758095, "rewards/chosen": -66.2871822260675, "rewards/rejected": -67.7151051859061, "rewards/margins": 1.4279229598385932, "rewards/accuracies": 0.75, "logps/chosen": -6.62871822260675, "logps/rejected": -6.77151051859061, "nll_loss": 6.629100131988525, "margins/logp": 0.14279229598385945, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.62871822260675, "logps_per_token/rejected": -6.77151051859061, "lengths/chosen": 13.75, "lengths/rejected": 11.75, "tokens_per_second": 7081.393974115242, "grad_norm": 9.53254222869873, "learning_rate": 0.0006545084971874737, "pairs_per_second": 172.7169261979327, "epoch": 0.25}');
INSERT INTO "prefsweep_point" VALUES('finished',2,0,'{"eval_loss": 1.124340018330026, "eval_rewards/chosen": -33.29711302868027, "eval_rewards/rejected": -33.3166440668064, "eval_rewards/margins": 0.019531038126129108, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659422605736054, "eval_logps/rejected": -6.6633288133612805, "eval_nll_loss": 6.636226889666389, "eval_margins/logp": 0.003906207625225977, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659422605736054, "eval_logps_per_token/rejected": -6.6633288133612805, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',2,3,'{"loss": 2.715262607243117, "rewards/chosen": -35.67414175508878, "rewards/rejected": -33.71200728677697, "rewards/margins": -1.9621344683118114, "rewards/accuracies": 0.25, "logps/chosen": -7.134828351017756, "logps/rejected": -6.742401457355394, "nll_loss": 7.0737243592739105, "margins/logp": -0.39242689366236205, "accuracies/logp": 0.25, "logps_per_token/chosen": -7.134828351017756, "logps_per_token/rejected": -6.742401457355394, "lengths/chosen": 8.0, "lengths/rejected": 11.25, "tokens_per_second": 3593.866360798051, "grad_norm": 5.896457672119141, "learning_rate": 0.0009045084971874737, "pairs_per_second": 100.52773037197346, "epoch": 0.1875, "eval_loss": 1.1207074947661142, "eval_rewards/chosen": -33.296278776757056, "eval_rewards/rejected": -33.30016965546993, "eval_rewards/margins": 0.003890878712876855, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.659255755351412, "eval_logps/rejected": -6.660033931093986, "eval_nll_loss": 6.635095153135412, "eval_margins/logp": 0.0007781757425753266, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.659255755351412, "eval_logps_per_token/rejected": -6.660033931093986, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',2,2,'{"loss": 0.9477033975304522, "rewards/chosen": -34.249758464594684, "rewards/rejected": -34.42599799330272, "rewards/margins": 0.1762395287080416, "rewards/accuracies": 0.5, "logps/chosen": -6.849951692918936, "logps/rejected": -6.885199598660544, "nll_loss": 6.775345170497895, "margins/logp": 0.03524790574160819, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.849951692918936, "logps_per_token/rejected": -6.885199598660544, "lengths/chosen": 10.0, "lengths/rejected": 9.75, "tokens_per_second": 2658.7766851706738, "grad_norm": 5.604532241821289, "learning_rate": 0.001, "pairs_per_second": 70.43117046809732, "epoch": 0.125}');
INSERT INTO "prefsweep_point" VALUES('finished',2,1,'{"loss": 1.1591543011685306, "rewards/chosen": -33.62873583547236, "rewards/rejected": -34.27819702171144, "rewards/margins": 0.649461186239078, "rewards/accuracies": 0.5, "logps/chosen": -6.725747167094473, "logps/rejected": -6.855639404342288, "nll_loss": 6.773893787747338, "margins/logp": 0.1298922372478155, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.725747167094473, "logps_per_token/rejected": -6.855639404342288, "lengths/chosen": 10.5, "lengths/rejected": 6.75, "tokens_per_second": 23825.559803487013, "grad_norm": 6.884642124176025, "learning_rate": 0.0, "pairs_per_second": 639.6123437177721, "epoch": 0.0625}');
INSERT INTO "prefsweep_point" VALUES('finished',2,6,'{"loss": 0.9046925126949827, "rewards/chosen": -33.66514921532392, "rewards/rejected": -34.50691226621469, "rewards/margins": 0.8417630508907621, "rewards/accuracies": 0.5, "logps/chosen": -6.733029843064785, "logps/rejected": -6.901382453242938, "nll_loss": 6.708609187084695, "margins/logp": 0.16835261017815228, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.733029843064785, "logps_per_token/rejected": -6.901382453242938, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 16362.410162630318, "grad_norm": 5.175811767578125, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 430.58974112185047, "epoch": 0.375, "eval_loss": 1.120305115867617, "eval_rewards/chosen": -33.29009695189443, "eval_rewards/rejected": -33.29268433745689, "eval_rewards/margins": 0.0025873855624714004, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658019390378884, "eval_logps/rejected": -6.658536867491378, "eval_nll_loss": 6.633679187999052, "eval_margins/logp": 0.0005174771124942801, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658019390378884, "eval_logps_per_token/rejected": -6.658536867491378, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',2,5,'{"loss": 0.5136672252971686, "rewards/chosen": -33.45415021218951, "rewards/rejected": -34.63260988855646, "rewards/margins": 1.1784596763669501, "rewards/accuracies": 0.75, "logps/chosen": -6.690830042437901, "logps/rejected": -6.926521977711292, "nll_loss": 6.716747926629108, "margins/logp": 0.23569193527338994, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.690830042437901, "logps_per_token/rejected": -6.926521977711292, "lengths/chosen": 11.5, "lengths/rejected": 9.25, "tokens_per_second": 13891.242682940652, "grad_norm": 4.416593074798584, "learning_rate": 0.00034549150281252633, "pairs_per_second": 396.8926480840186, "epoch": 0.3125}');
INSERT INTO "prefsweep_point" VALUES('finished',2,4,'{"loss": 0.6641959859879116, "rewards/chosen": -33.1415404748349, "rewards/rejected": -33.853257293502494, "rewards/margins": 0.7117168186675951, "rewards/accuracies": 0.75, "logps/chosen": -6.62830809496698, "logps/rejected": -6.770651458700498, "nll_loss": 6.628663860667835, "margins/logp": 0.14234336373351875, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.62830809496698, "logps_per_token/rejected": -6.770651458700498, "lengths/chosen": 13.75, "lengths/rejected": 11.75, "tokens_per_second": 10871.914986703374, "grad_norm": 4.697624683380127, "learning_rate": 0.0006545084971874737, "pairs_per_second": 265.1686582122774, "epoch": 0.25}');
INSERT INTO "prefsweep_point" VALUES('finished',3,0,'{"eval_loss": 1.3323931068612245, "eval_rewards/chosen": -13.318845211472109, "eval_rewards/rejected": -13.326657626722561, "eval_rewards/margins": 0.007812415250451954, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659422605736054, "eval_logps/rejected": -6.6633288133612805, "eval_nll_loss": 6.636226889666389, "eval_margins/logp": 0.003906207625225977, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659422605736054, "eval_logps_per_token/rejected": -6.6633288133612805, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',3,3,'{"loss": 1.9787923902396878, "rewards/chosen": -14.268341283003489, "rewards/rejected": -13.484151592695868, "rewards/margins": -0.7841896903076209, "rewards/accuracies": 0.25, "logps/chosen": -7.134170641501744, "logps/rejected": -6.742075796347934, "nll_loss": 7.072640419006348, "margins/logp": -0.39209484515381043, "accuracies/logp": 0.25, "logps_per_token/chosen": -7.134170641501744, "logps_per_token/rejected": -6.742075796347934, "lengths/chosen": 8.0, "lengths/rejected": 11.25, "tokens_per_second": 5583.752638474624, "grad_norm": 2.394461154937744, "learning_rate": 0.0009045084971874737, "pairs_per_second": 156.18888499229718, "epoch": 0.1875, "eval_loss": 1.3339564080354913, "eval_rewards/chosen": -13.31426970841836, "eval_rewards/rejected": -13.317621067615564, "eval_rewards/margins": 0.0033513591972038625, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.65713485420918, "eval_logps/rejected": -6.658810533807782, "eval_nll_loss": 6.633039081797881, "eval_margins/logp": 0.0016756795986019313, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.65713485420918, "eval_logps_per_token/rejected": -6.658810533807782, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',3,2,'{"loss": 1.273386740016004, "rewards/chosen": -13.699903385837873, "rewards/rejected": -13.770399197321089, "rewards/margins": 0.07049581148321638, "rewards/accuracies": 0.5, "logps/chosen": -6.849951692918936, "logps/rejected": -6.885199598660544, "nll_loss": 6.775345170497895, "margins/logp": 0.03524790574160819, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.849951692918936, "logps_per_token/rejected": -6.885199598660544, "lengths/chosen": 10.0, "lengths/rejected": 9.75, "tokens_per_second": 35077.27802020069, "grad_norm": 2.6366677284240723, "learning_rate": 0.001, "pairs_per_second": 929.1994177536608, "epoch": 0.125}');
INSERT INTO "prefsweep_point" VALUES('finished',3,1,'{"loss": 1.2407971520836822, "rewards/chosen": -13.451494334188945, "rewards/rejected": -13.711278808684575, "rewards/margins": 0.259784474495631, "rewards/accuracies": 0.5, "logps/chosen": -6.725747167094473, "logps/rejected": -6.855639404342288, "nll_loss": 6.773893787747338, "margins/logp": 0.1298922372478155, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.725747167094473, "logps_per_token/rejected": -6.855639404342288, "lengths/chosen": 10.5, "lengths/rejected": 6.75, "tokens_per_second": 23101.742240267264, "grad_norm": 2.813110113143921, "learning_rate": 0.0, "pairs_per_second": 620.1809997387185, "epoch": 0.0625}');
INSERT INTO "prefsweep_point" VALUES('finished',3,6,'{"loss": 1.152038948307756, "rewards/chosen": -13.457398552485188, "rewards/rejected": -13.7937475780646, "rewards/margins": 0.3363490255794135, "rewards/accuracies": 0.5, "logps/chosen": -6.728699276242594, "logps/rejected": -6.8968737890323, "nll_loss": 6.704357997230861, "margins/logp": 0.16817451278970674, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.728699276242594, "logps_per_token/rejected": -6.8968737890323, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 33539.57969030155, "grad_norm": 2.2851455211639404, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 882.6205181658304, "epoch": 0.375, "eval_loss": 1.3344803651398376, "eval_rewards/chosen": -13.310945468980233, "eval_rewards/rejected": -13.313547912918843, "eval_rewards/margins": 0.00260244393860809, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.655472734490116, "eval_logps/rejected": -6.656773956459421, "eval_nll_loss": 6.631191898794735, "eval_margins/logp": 0.001301221969304045, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.655472734490116, "eval_logps_per_token/rejected": -6.656773956459421, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',3,5,'{"loss": 1.0109946073633829, "rewards/chosen": -13.383762666157313, "rewards/rejected": -13.8521966511768, "rewards/margins": 0.46843398501948696, "rewards/accuracies": 0.75, "logps/chosen": -6.691881333078657, "logps/rejected": -6.9260983255884, "nll_loss": 6.718030701512876, "margins/logp": 0.23421699250974348, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.691881333078657, "logps_per_token/rejected": -6.9260983255884, "lengths/chosen": 11.5, "lengths/rejected": 9.25, "tokens_per_second": 13305.944630880851, "grad_norm": 2.708191394805908, "learning_rate": 0.00034549150281252633, "pairs_per_second": 380.16984659659573, "epoch": 0.3125}');
INSERT INTO "prefsweep_point" VALUES('finished',3,4,'{"loss": 1.1261176712938852, "rewards/chosen": -13.254558462756021, "rewards/rejected": -13.53627993663152, "rewards/margins": 0.2817214738754994, "rewards/accuracies": 0.75, "logps/chosen": -6.627279231378011, "logps/rejected": -6.76813996831576, "nll_loss": 6.62759015343406, "margins/logp": 0.1408607369377497, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.627279231378011, "logps_per_token/rejected": -6.76813996831576, "lengths/chosen": 13.75, "lengths/rejected": 11.75, "tokens_per_second": 26402.75078267856, "grad_norm": 2.828157424926758, "learning_rate": 0.0006545084971874737, "pairs_per_second": 643.9695312848429, "epoch": 0.25}');
INSERT INTO "prefsweep_point" VALUES('finished',4,0,'{"eval_loss": 1.1884415770185912, "eval_rewards/chosen": -19.978267817208163, "eval_rewards/rejected": -19.98998644008384, "eval_rewards/margins": 0.011718622875678264, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.659422605736054, "eval_logps/rejected": -6.6633288133612805, "eval_nll_loss": 6.636226889666389, "eval_margins/logp": 0.003906207625225977, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.659422605736054, "eval_logps_per_token/rejected": -6.6633288133612805, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',4,3,'{"loss": 2.1452472018546045, "rewards/chosen": -21.403816027136948, "rewards/rejected": -20.226801881639215, "rewards/margins": -1.1770141454977345, "rewards/accuracies": 0.25, "logps/chosen": -7.134605342378983, "logps/rejected": -6.7422672938797374, "nll_loss": 7.073302000761032, "margins/logp": -0.3923380484992449, "accuracies/logp": 0.25, "logps_per_token/chosen": -7.134605342378983, "logps_per_token/rejected": -6.7422672938797374, "lengths/chosen": 8.0, "lengths/rejected": 11.25, "tokens_per_second": 6021.869577702544, "grad_norm": 3.5533132553100586, "learning_rate": 0.0009045084971874737, "pairs_per_second": 168.44390427139982, "epoch": 0.1875, "eval_loss": 1.1896575597391086, "eval_rewards/chosen": -19.975008743280398, "eval_rewards/rejected": -19.978093479949358, "eval_rewards/margins": 0.00308473666895992, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658336247760132, "eval_logps/rejected": -6.659364493316453, "eval_nll_loss": 6.634219865237966, "eval_margins/logp": 0.0010282455563199733, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658336247760132, "eval_logps_per_token/rejected": -6.659364493316453, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',4,2,'{"loss": 1.0939871083201533, "rewards/chosen": -20.54985507875681, "rewards/rejected": -20.655598795981636, "rewards/margins": 0.10574371722482478, "rewards/accuracies": 0.5, "logps/chosen": -6.849951692918936, "logps/rejected": -6.885199598660544, "nll_loss": 6.775345170497895, "margins/logp": 0.03524790574160819, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.849951692918936, "logps_per_token/rejected": -6.885199598660544, "lengths/chosen": 10.0, "lengths/rejected": 9.75, "tokens_per_second": 24230.501068196023, "grad_norm": 3.6536705493927, "learning_rate": 0.001, "pairs_per_second": 641.8675779654576, "epoch": 0.125}');
INSERT INTO "prefsweep_point" VALUES('finished',4,1,'{"loss": 1.1327261554658612, "rewards/chosen": -20.17724150128342, "rewards/rejected": -20.566918213026867, "rewards/margins": 0.389676711743447, "rewards/accuracies": 0.5, "logps/chosen": -6.725747167094473, "logps/rejected": -6.855639404342288, "nll_loss": 6.773893787747338, "margins/logp": 0.1298922372478155, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.725747167094473, "logps_per_token/rejected": -6.855639404342288, "lengths/chosen": 10.5, "lengths/rejected": 6.75, "tokens_per_second": 1418.6491812965512, "grad_norm": 4.142894744873047, "learning_rate": 0.0, "pairs_per_second": 38.08454177977319, "epoch": 0.0625}');
INSERT INTO "prefsweep_point" VALUES('finished',4,6,'{"loss": 0.9884248170192409, "rewards/chosen": -20.192899903048684, "rewards/rejected": -20.698357474803924, "rewards/margins": 0.5054575717552403, "rewards/accuracies": 0.5, "logps/chosen": -6.730966634349562, "logps/rejected": -6.899452491601308, "nll_loss": 6.706580265708592, "margins/logp": 0.1684858572517467, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.730966634349562, "logps_per_token/rejected": -6.899452491601308, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 6094.069500195914, "grad_norm": 3.208407402038574, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 160.3702500051556, "epoch": 0.375, "eval_loss": 1.1903082664214457, "eval_rewards/chosen": -19.970772560469776, "eval_rewards/rejected": -19.972498833907373, "eval_rewards/margins": 0.001726273437598902, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.656924186823257, "eval_logps/rejected": -6.657499611302457, "eval_nll_loss": 6.632606764400706, "eval_margins/logp": 0.000575424479199671, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.656924186823257, "eval_logps_per_token/rejected": -6.657499611302457, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('finished',4,5,'{"loss": 0.7573189778576592, "rewards/chosen": -20.073822135017032, "rewards/rejected": -20.778479522253786, "rewards/margins": 0.7046573872367548, "rewards/accuracies": 0.75, "logps/chosen": -6.6912740450056765, "logps/rejected": -6.926159840751263, "nll_loss": 6.717342936474344, "margins/logp": 0.234885795745585, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.6912740450056765, "logps_per_token/rejected": -6.926159840751263, "lengths/chosen": 11.5, "lengths/rejected": 9.25, "tokens_per_second": 4827.929156278946, "grad_norm": 3.3887062072753906, "learning_rate": 0.00034549150281252633, "pairs_per_second": 137.9408330365413, "epoch": 0.3125}');
INSERT INTO "prefsweep_point" VALUES('finished',4,4,'{"loss": 0.8951261740100805, "rewards/chosen": -19.884050481660026, "rewards/rejected": -20.308634272217752, "rewards/margins": 0.4245837905577261, "rewards/accuracies": 0.75, "logps/chosen": -6.628016827220009, "logps/rejected": -6.769544757405916, "nll_loss": 6.628344509818337, "margins/logp": 0.14152793018590826, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.628016827220009, "logps_per_token/rejected": -6.769544757405916, "lengths/chosen": 13.75, "lengths/rejected": 11.75, "tokens_per_second": 2829.5113966779904, "grad_norm": 3.598803758621216, "learning_rate": 0.0006545084971874737, "pairs_per_second": 69.01247308970709, "epoch": 0.25}');
CREATE TABLE prefsweep_progress (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	metrics TEXT NOT NULL, 
	PRIMARY KEY (sweep, trial)
);
INSERT INTO "prefsweep_progress" VALUES('finished',0,6,'{"eval_loss": 1.4234789376742571, "eval_rewards/chosen": -66.58862814827404, "eval_rewards/rejected": -66.60331831379065, "eval_rewards/margins": 0.0146901655166074, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658862814827405, "eval_logps/rejected": -6.660331831379066, "eval_nll_loss": 6.634599152733298, "eval_margins/logp": 0.0014690165516605402, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658862814827405, "eval_logps_per_token/rejected": -6.660331831379066, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 1.1257872425993933, "rewards/chosen": -67.34305612968676, "rewards/rejected": -69.03613125284514, "rewards/margins": 1.6930751231583692, "rewards/accuracies": 0.5, "logps/chosen": -6.734305612968676, "logps/rejected": -6.903613125284513, "nll_loss": 6.709725079329117, "margins/logp": 0.16930751231583696, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.734305612968676, "logps_per_token/rejected": -6.903613125284513, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 10830.367096222351, "grad_norm": 10.915966033935547, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 285.00966042690396, "epoch": 0.375}');
INSERT INTO "prefsweep_progress" VALUES('finished',1,6,'{"eval_loss": 1.7113800037610396, "eval_rewards/chosen": -66.58337253090153, "eval_rewards/rejected": -66.59323363487272, "eval_rewards/margins": 0.009861103971190666, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658337253090153, "eval_logps/rejected": -6.659323363487273, "eval_nll_loss": 6.63400161967558, "eval_margins/logp": 0.0009861103971190444, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658337253090153, "eval_logps_per_token/rejected": -6.659323363487273, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 1.4038419140484475, "rewards/chosen": -67.33671315648684, "rewards/rejected": -69.0224980711937, "rewards/margins": 1.6857849147068649, "rewards/accuracies": 0.5, "logps/chosen": -6.733671315648683, "logps/rejected": -6.902249807119369, "nll_loss": 6.709186699079431, "margins/logp": 0.16857849147068626, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.733671315648683, "logps_per_token/rejected": -6.902249807119369, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 6774.643791850213, "grad_norm": 11.955209732055664, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 178.28009978553195, "epoch": 0.375}');
INSERT INTO "prefsweep_progress" VALUES('finished',2,6,'{"eval_loss": 1.120305115867617, "eval_rewards/chosen": -33.29009695189443, "eval_rewards/rejected": -33.29268433745689, "eval_rewards/margins": 0.0025873855624714004, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.658019390378884, "eval_logps/rejected": -6.658536867491378, "eval_nll_loss": 6.633679187999052, "eval_margins/logp": 0.0005174771124942801, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.658019390378884, "eval_logps_per_token/rejected": -6.658536867491378, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 0.9046925126949827, "rewards/chosen": -33.66514921532392, "rewards/rejected": -34.50691226621469, "rewards/margins": 0.8417630508907621, "rewards/accuracies": 0.5, "logps/chosen": -6.733029843064785, "logps/rejected": -6.901382453242938, "nll_loss": 6.708609187084695, "margins/logp": 0.16835261017815228, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.733029843064785, "logps_per_token/rejected": -6.901382453242938, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 16362.410162630318, "grad_norm": 5.175811767578125, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 430.58974112185047, "epoch": 0.375}');
INSERT INTO "prefsweep_progress" VALUES('finished',3,6,'{"eval_loss": 1.3344803651398376, "eval_rewards/chosen": -13.310945468980233, "eval_rewards/rejected": -13.313547912918843, "eval_rewards/margins": 0.00260244393860809, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.655472734490116, "eval_logps/rejected": -6.656773956459421, "eval_nll_loss": 6.631191898794735, "eval_margins/logp": 0.001301221969304045, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.655472734490116, "eval_logps_per_token/rejected": -6.656773956459421, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 1.152038948307756, "rewards/chosen": -13.457398552485188, "rewards/rejected": -13.7937475780646, "rewards/margins": 0.3363490255794135, "rewards/accuracies": 0.5, "logps/chosen": -6.728699276242594, "logps/rejected": -6.8968737890323, "nll_loss": 6.704357997230861, "margins/logp": 0.16817451278970674, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.728699276242594, "logps_per_token/rejected": -6.8968737890323, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 33539.57969030155, "grad_norm": 2.2851455211639404, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 882.6205181658304, "epoch": 0.375}');
INSERT INTO "prefsweep_progress" VALUES('finished',4,6,'{"eval_loss": 1.1903082664214457, "eval_rewards/chosen": -19.970772560469776, "eval_rewards/rejected": -19.972498833907373, "eval_rewards/margins": 0.001726273437598902, "eval_rewards/accuracies": 0.75, "eval_logps/chosen": -6.656924186823257, "eval_logps/rejected": -6.657499611302457, "eval_nll_loss": 6.632606764400706, "eval_margins/logp": 0.000575424479199671, "eval_accuracies/logp": 0.75, "eval_logps_per_token/chosen": -6.656924186823257, "eval_logps_per_token/rejected": -6.657499611302457, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 0.9884248170192409, "rewards/chosen": -20.192899903048684, "rewards/rejected": -20.698357474803924, "rewards/margins": 0.5054575717552403, "rewards/accuracies": 0.5, "logps/chosen": -6.730966634349562, "logps/rejected": -6.899452491601308, "nll_loss": 6.706580265708592, "margins/logp": 0.1684858572517467, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.730966634349562, "logps_per_token/rejected": -6.899452491601308, "lengths/chosen": 11.5, "lengths/rejected": 9.0, "tokens_per_second": 6094.069500195914, "grad_norm": 3.208407402038574, "learning_rate": 9.549150281252633e-05, "pairs_per_second": 160.3702500051556, "epoch": 0.375}');
CREATE TABLE prefsweep_request (
	sweep VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	trial INTEGER, 
	kind VARCHAR(64) NOT NULL, 
	text TEXT NOT NULL, 
	done_at FLOAT, 
	PRIMARY KEY (sweep, seq)
);
CREATE TABLE prefsweep_spec (
	sweep VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	spec TEXT NOT NULL, 
	PRIMARY KEY (sweep, version)
);
INSERT INTO "prefsweep_spec" VALUES('finished',1,1.79586706075905299185e+09,'e572c6a92dfc884711ef56825c3be4ea89d104199176325b91fb273c2cb6c9f5','{"name":"finished","description":"A sweep from before the redesign","base":{"model":{"name_or_path":null,"generated":{"architecture":"llama","vocab_size":512,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"max_position_embeddings":512,"seed":0},"revision":null,"tokenizer":null,"dtype":"float32","attention":"auto","load_in_4bit":false},"data":{"train":[{"generated":"instructions","split":"train","rows":64,"seed":0,"weight":null}],"eval":[{"generated":"instructions","split":"eval","rows":8,"seed":0,"weight":null}],"eval_share":0.1,"max_train_rows":null,"max_eval_rows":null,"max_length":128,"max_prompt_length":null,"chat_template":null,"bad_rows":"refuse","max_bad_share":0.01},"loss":{"kind":"simpo","loss_type":"sigmoid","beta":2.0,"gamma":null,"gamma_beta_ratio":null,"label_smoothing":0.0,"alpha":0.0,"sft_weight":0.0,"nll_scale":0.0},"training":{"learning_rate":0.001,"pairs_per_update":4,"tokens_per_micro_batch":8192,"num_train_epochs":1.0,"max_steps":6,"lr_scheduler_type":"cosine","warmup_ratio":0.1,"weight_decay":0.0,"adam_beta1":0.9,"adam_beta2":0.999,"adam_epsilon":1e-8,"max_grad_norm":1.0,"bf16":false,"stochastic_rounding":true,"gradient_checkpointing":false,"distributed":"ddp","seed":42,"logging_steps":1,"eval_steps":3,"save_steps":2},"lora":null,"evaluation":{"prompts":2,"answer_steps":null,"samples":1,"max_new_tokens":4},"engine":"packed"},"search":{"dimensions":{"loss.beta":{"when":{},"choice":[2.0,5.0,10.0]},"loss.gamma":{"when":{},"choice":[0.5,1.0]}},"zipped":[]},"sampler":{"kind":"tpe","seed":1,"n_startup_trials":10,"n_ei_candidates":24},"enqueue":[],"warm_start":null,"order":{"kind":"reproducible","lag":null},"goal":{"metric":"eval_accuracies/logp","direction":"maximize"},"guard":{"loss":{"ratio":1.5,"updates":20},"grad_norm":{"times_median":20.0,"above":1000000.0,"updates":5,"after":10},"chosen_logps":{"fall":2.3,"fall_alone":4.6,"lowest":-10.0,"updates":5},"repetition":{"rise":0.5,"looks":2},"answer_length":{"ratio":3.0,"looks":2}},"also":[],"pruner":{"kind":"median","metric":null,"n_startup_trials":5,"n_warmup_steps":0,"n_min_trials":1},"budget":{"trials":4,"hours":null,"gpu_hours":null,"target":null,"concurrency":1},"resources":{"gpus_per_trial":null,"cpus_per_trial":1.0,"processes_per_trial":null,"trials_per_process":"auto"},"tracking":{"uri":null,"experiment":"prefsweep","artifacts":null},"notify":null,"judge":null,"sft":{"training":{"learning_rate":0.002,"pairs_per_update":4,"tokens_per_micro_batch":8192,"num_train_epochs":1.0,"max_steps":2,"lr_scheduler_type":"cosine","warmup_ratio":0.1,"weight_decay":0.0,"adam_beta1":0.9,"adam_beta2":0.999,"adam_epsilon":1e-8,"max_grad_norm":1.0,"bf16":false,"stochastic_rounding":true,"gradient_checkpointing":false,"distributed":"ddp","seed":42,"logging_steps":1,"eval_steps":null,"save_steps":null},"data":null},"keep_models":1,"storage":null,"mirror":null}');
CREATE TABLE prefsweep_sweep (
	sweep VARCHAR(64) NOT NULL, 
	id VARCHAR(32) NOT NULL, 
	schema INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	driver INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (sweep)
);
INSERT INTO "prefsweep_sweep" VALUES('finished','4d40e312103348d78ad24ab38ec8154b',5,1,0,1.79586706074936795231e+09);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'finished');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'settled','{"lag": 2, "train_pairs": 64, "earlier": []}');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,1,3,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,1,6,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,2,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(5,2,3,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(6,2,6,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(7,3,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(8,3,3,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(9,3,6,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(10,4,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(11,4,3,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(12,4,6,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(13,5,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(14,5,3,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(15,5,6,0.75,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'loss.beta',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2.0, 5.0, 10.0]}}');
INSERT INTO "trial_params" VALUES(2,1,'loss.gamma',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1.0]}}');
INSERT INTO "trial_params" VALUES(3,2,'loss.beta',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2.0, 5.0, 10.0]}}');
INSERT INTO "trial_params" VALUES(4,2,'loss.gamma',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1.0]}}');
INSERT INTO "trial_params" VALUES(5,3,'loss.beta',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2.0, 5.0, 10.0]}}');
INSERT INTO "trial_params" VALUES(6,3,'loss.gamma',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1.0]}}');
INSERT INTO "trial_params" VALUES(7,4,'loss.beta',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2.0, 5.0, 10.0]}}');
INSERT INTO "trial_params" VALUES(8,4,'loss.gamma',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.5, 1.0]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'identity','"9314c02594a028ccea00fbb7587f34658c94c5c25ed0845d2046f2a2ce7c1ecb"');
INSERT INTO "trial_user_attributes" VALUES(2,1,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(3,1,'started_at','1795867078.6034648');
INSERT INTO "trial_user_attributes" VALUES(4,1,'updates','6');
INSERT INTO "trial_user_attributes" VALUES(5,1,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(6,1,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 4, "finished_at": 1795867099.159433}');
INSERT INTO "trial_user_attributes" VALUES(7,1,'values','["0.75"]');
INSERT INTO "trial_user_attributes" VALUES(8,2,'identity','"d11feca00368b114339146d914efcbe8631b6dc26d741090b9cc31cdb4737716"');
INSERT INTO "trial_user_attributes" VALUES(9,2,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(10,2,'started_at','1795867099.2046883');
INSERT INTO "trial_user_attributes" VALUES(11,2,'updates','6');
INSERT INTO "trial_user_attributes" VALUES(12,2,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(13,2,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 7, "finished_at": 1795867099.812257}');
INSERT INTO "trial_user_attributes" VALUES(14,2,'values','["0.75"]');
INSERT INTO "trial_user_attributes" VALUES(15,3,'identity','"2a93ba01a0269825f15cf7d31ef0a03605ae34e3d2782d187411ccfedd73d6ed"');
INSERT INTO "trial_user_attributes" VALUES(16,3,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(17,3,'started_at','1795867099.8265185');
INSERT INTO "trial_user_attributes" VALUES(18,3,'updates','6');
INSERT INTO "trial_user_attributes" VALUES(19,3,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(20,3,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 10, "finished_at": 1795867100.4221346}');
INSERT INTO "trial_user_attributes" VALUES(21,3,'values','["0.75"]');
INSERT INTO "trial_user_attributes" VALUES(22,4,'identity','"747a6072e178aeceacb312e1176bf3d7ca5ae2cf4e5fa74f96c863547edc73e9"');
INSERT INTO "trial_user_attributes" VALUES(23,4,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(24,4,'started_at','1795867100.5123975');
INSERT INTO "trial_user_attributes" VALUES(25,4,'updates','6');
INSERT INTO "trial_user_attributes" VALUES(26,4,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(27,4,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 13, "finished_at": 1795867100.8684447}');
INSERT INTO "trial_user_attributes" VALUES(28,4,'values','["0.75"]');
INSERT INTO "trial_user_attributes" VALUES(29,5,'identity','"8c560d9a1633aa75396db9bccbfcd77cb11cb41c55de342e2ced4ccbc20eb85f"');
INSERT INTO "trial_user_attributes" VALUES(30,5,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(31,5,'started_at','1795867151.4558353');
INSERT INTO "trial_user_attributes" VALUES(32,5,'updates','6');
INSERT INTO "trial_user_attributes" VALUES(33,5,'given','{"leaves": {"loss.beta": 3}, "params": {"loss.beta": 3.0, "loss.gamma": 0.75}, "origin": "enqueued by user@old-machine, pid 17934", "by_hand": true, "parent": null, "fork": null}');
INSERT INTO "trial_user_attributes" VALUES(34,5,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(35,5,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 18, "finished_at": 1795867169.168021}');
INSERT INTO "trial_user_attributes" VALUES(36,5,'values','["0.75"]');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,0.75,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,0.75,'FINITE');
INSERT INTO "trial_values" VALUES(3,3,0,0.75,'FINITE');
INSERT INTO "trial_values" VALUES(4,4,0,0.75,'FINITE');
INSERT INTO "trial_values" VALUES(5,5,0,0.75,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-28 11:57:58.603519','2026-11-28 11:58:19.164816');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-28 11:58:19.204712','2026-11-28 11:58:19.815855');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-11-28 11:58:19.826549','2026-11-28 11:58:20.425230');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-28 11:58:20.512419','2026-11-28 11:58:20.871550');
INSERT INTO "trials" VALUES(5,4,1,'COMPLETE','2026-11-28 11:59:11.455853','2026-11-28 11:59:29.181995');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
