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
INSERT INTO "prefsweep_attempt" VALUES('interrupted',0,1,1.79586720701318478584e+09,1.0,1.97494584330015641171e+01);
INSERT INTO "prefsweep_attempt" VALUES('interrupted',1,1,1.79586724386402535433e+09,1.0,1.46002228199904493521e+00);
CREATE TABLE prefsweep_beat (
	sweep VARCHAR(64) NOT NULL, 
	driver INTEGER NOT NULL, 
	beats INTEGER NOT NULL, 
	PRIMARY KEY (sweep, driver)
);
INSERT INTO "prefsweep_beat" VALUES('interrupted',1,3);
CREATE TABLE prefsweep_driver (
	sweep VARCHAR(64) NOT NULL, 
	driver INTEGER NOT NULL, 
	holder TEXT NOT NULL, 
	at FLOAT NOT NULL, 
	seconds FLOAT NOT NULL, 
	PRIMARY KEY (sweep, driver)
);
INSERT INTO "prefsweep_driver" VALUES('interrupted',1,'pid 19015 on old-machine, process b36f0986-7a93-428b-8a29-75be45ea639d/pid:[4026531836]/1282038',1.79586720600868868834e+09,3.93670701629998802673e+01);
CREATE TABLE prefsweep_event (
	sweep VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	trial INTEGER, 
	kind VARCHAR(64) NOT NULL, 
	text TEXT NOT NULL, 
	PRIMARY KEY (sweep, seq)
);
INSERT INTO "prefsweep_event" VALUES('interrupted',1,1.79586720594839167591e+09,NULL,'created','sweep interrupted');
INSERT INTO "prefsweep_event" VALUES('interrupted',2,1.79586720602521324151e+09,NULL,'driver','pid 19015 on old-machine drives');
INSERT INTO "prefsweep_event" VALUES('interrupted',3,1.79586720689227318762e+09,0,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('interrupted',4,1.79586724381754946709e+09,0,'complete','');
INSERT INTO "prefsweep_event" VALUES('interrupted',5,1.79586724382984876634e+09,0,'worker','worker.answers_computed=1 worker.data_loaded=1 worker.imports=1 worker.model_loaded=1 worker.pid=20118 worker.start_computed=1 worker.trials=1');
INSERT INTO "prefsweep_event" VALUES('interrupted',6,1.79586724385962510103e+09,1,'issued','attempt 1');
INSERT INTO "prefsweep_event" VALUES('interrupted',7,1.79586724512250065803e+09,NULL,'stopping','interrupted');
INSERT INTO "prefsweep_event" VALUES('interrupted',8,1.79586724539201283458e+09,1,'released','attempt 1 interrupted');
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
INSERT INTO "prefsweep_point" VALUES('interrupted',0,0,'{"eval_loss": 1.4636131747359342, "eval_rewards/chosen": -66.86655304880554, "eval_rewards/rejected": -66.91575515985767, "eval_rewards/margins": 0.04920211105212147, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.686655304880555, "eval_logps/rejected": -6.691575515985766, "eval_nll_loss": 6.664453472810633, "eval_margins/logp": 0.0049202111052121245, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.686655304880555, "eval_logps_per_token/rejected": -6.691575515985766, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,20,'{"loss": 1.6708481319334687, "rewards/chosen": -67.87071965746743, "rewards/rejected": -68.13781398637987, "rewards/margins": 0.26709432891242885, "rewards/accuracies": 0.45, "logps/chosen": -6.787071965746743, "logps/rejected": -6.813781398637985, "nll_loss": 6.795400844430024, "margins/logp": 0.0267094328912429, "accuracies/logp": 0.45, "logps_per_token/chosen": -6.787071965746743, "logps_per_token/rejected": -6.813781398637985, "lengths/chosen": 10.6, "lengths/rejected": 10.05, "tokens_per_second": 20847.702175418934, "grad_norm": 12.197585773468017, "learning_rate": 0.0008636868207865244, "pairs_per_second": 567.2844129365697, "epoch": 1.6666666666666667, "eval_loss": 1.454402365362642, "eval_rewards/chosen": -66.83615986082877, "eval_rewards/rejected": -66.68994813272745, "eval_rewards/margins": -0.14621172810132954, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.683615986082878, "eval_logps/rejected": -6.668994813272745, "eval_nll_loss": 6.658023559345919, "eval_margins/logp": -0.014621172810132754, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.683615986082878, "eval_logps_per_token/rejected": -6.668994813272745, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,15,'{"loss": 1.062155385207792, "rewards/chosen": -67.65476007314966, "rewards/rejected": -68.66071314077185, "rewards/margins": 1.0059530676221886, "rewards/accuracies": 0.65, "logps/chosen": -6.765476007314966, "logps/rejected": -6.8660713140771845, "nll_loss": 6.730375985128689, "margins/logp": 0.10059530676221895, "accuracies/logp": 0.65, "logps_per_token/chosen": -6.765476007314966, "logps_per_token/rejected": -6.8660713140771845, "lengths/chosen": 11.3, "lengths/rejected": 9.75, "tokens_per_second": 10663.463216476905, "grad_norm": 9.72955892086029, "learning_rate": 0.0009468163201617061, "pairs_per_second": 283.98037860124913, "epoch": 1.25}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,10,'{"loss": 1.4425913642079788, "rewards/chosen": -67.21274209859197, "rewards/rejected": -68.65715555681122, "rewards/margins": 1.44441345821926, "rewards/accuracies": 0.5, "logps/chosen": -6.721274209859198, "logps/rejected": -6.865715555681123, "nll_loss": 6.715024770333849, "margins/logp": 0.14444134582192603, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.721274209859198, "logps_per_token/rejected": -6.865715555681123, "lengths/chosen": 11.6, "lengths/rejected": 10.4, "tokens_per_second": 13736.421255669851, "grad_norm": 13.978794860839844, "learning_rate": 0.000992403876506104, "pairs_per_second": 349.08313229148285, "epoch": 0.8333333333333334}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,5,'{"loss": 2.4663816373750107, "rewards/chosen": -68.78304555725742, "rewards/rejected": -68.68019240436615, "rewards/margins": -0.10285315289125947, "rewards/accuracies": 0.45, "logps/chosen": -6.878304555725741, "logps/rejected": -6.868019240436615, "nll_loss": 6.838057428087507, "margins/logp": -0.010285315289125796, "accuracies/logp": 0.45, "logps_per_token/chosen": -6.878304555725741, "logps_per_token/rejected": -6.868019240436615, "lengths/chosen": 8.75, "lengths/rejected": 9.5, "tokens_per_second": 7144.117705355783, "grad_norm": 12.396790885925293, "learning_rate": 0.0006666666666666666, "pairs_per_second": 211.36442915253798, "epoch": 0.4166666666666667}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,35,'{"loss": 1.0810858481926016, "rewards/chosen": -66.97014675227284, "rewards/rejected": -68.74304151867462, "rewards/margins": 1.7728947664017745, "rewards/accuracies": 0.7, "logps/chosen": -6.697014675227284, "logps/rejected": -6.874304151867461, "nll_loss": 6.671922625993427, "margins/logp": 0.17728947664017763, "accuracies/logp": 0.7, "logps_per_token/chosen": -6.697014675227284, "logps_per_token/rejected": -6.874304151867461, "lengths/chosen": 9.5, "lengths/rejected": 11.15, "tokens_per_second": 8784.902057859266, "grad_norm": 8.951513195037842, "learning_rate": 0.0004709275855447621, "pairs_per_second": 233.02127474427763, "epoch": 2.9166666666666665}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,30,'{"loss": 1.2996825031396955, "rewards/chosen": -67.362991843482, "rewards/rejected": -68.2086633567342, "rewards/margins": 0.8456715132522202, "rewards/accuracies": 0.65, "logps/chosen": -6.7362991843482, "logps/rejected": -6.82086633567342, "nll_loss": 6.7111708636467275, "margins/logp": 0.08456715132522188, "accuracies/logp": 0.65, "logps_per_token/chosen": -6.7362991843482, "logps_per_token/rejected": -6.82086633567342, "lengths/chosen": 10.4, "lengths/rejected": 9.05, "tokens_per_second": 4343.3856621506875, "grad_norm": 11.67910327911377, "learning_rate": 0.0006153079353712201, "pairs_per_second": 122.86805267753006, "epoch": 2.5}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,25,'{"loss": 1.1027145683987052, "rewards/chosen": -67.43570802873941, "rewards/rejected": -69.2705787896895, "rewards/margins": 1.8348707609500763, "rewards/accuracies": 0.75, "logps/chosen": -6.7435708028739425, "logps/rejected": -6.92705787896895, "nll_loss": 6.74114517955219, "margins/logp": 0.18348707609500767, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.7435708028739425, "logps_per_token/rejected": -6.92705787896895, "lengths/chosen": 10.2, "lengths/rejected": 9.3, "tokens_per_second": 7135.032832555831, "grad_norm": 8.032204532623291, "learning_rate": 0.00075, "pairs_per_second": 195.4803515768721, "epoch": 2.0833333333333335}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,40,'{"loss": 0.6491636909284748, "rewards/chosen": -66.96814534445232, "rewards/rejected": -68.98899506487028, "rewards/margins": 2.020849720417962, "rewards/accuracies": 0.7, "logps/chosen": -6.696814534445231, "logps/rejected": -6.898899506487028, "nll_loss": 6.707717243830363, "margins/logp": 0.20208497204179615, "accuracies/logp": 0.7, "logps_per_token/chosen": -6.696814534445231, "logps_per_token/rejected": -6.898899506487028, "lengths/chosen": 11.25, "lengths/rejected": 9.75, "tokens_per_second": 7471.162538420173, "grad_norm": 8.150045490264892, "learning_rate": 0.0003289899283371657, "pairs_per_second": 192.30791604685132, "epoch": 3.3333333333333335, "eval_loss": 1.4642175317163697, "eval_rewards/chosen": -66.74385693440402, "eval_rewards/rejected": -66.55881065284058, "eval_rewards/margins": -0.18504628156342484, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.674385693440401, "eval_logps/rejected": -6.655881065284059, "eval_nll_loss": 6.647607954810647, "eval_margins/logp": -0.018504628156342573, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.674385693440401, "eval_logps_per_token/rejected": -6.655881065284059, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,55,'{"loss": 1.2430520294051566, "rewards/chosen": -67.2100384324917, "rewards/rejected": -68.06904484318706, "rewards/margins": 0.8590064106953555, "rewards/accuracies": 0.75, "logps/chosen": -6.72100384324917, "logps/rejected": -6.806904484318707, "nll_loss": 6.7161008351378975, "margins/logp": 0.08590064106953568, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.72100384324917, "logps_per_token/rejected": -6.806904484318707, "lengths/chosen": 10.8, "lengths/rejected": 10.65, "tokens_per_second": 7552.066440869464, "grad_norm": 8.522403907775878, "learning_rate": 3.0153689607045842e-05, "pairs_per_second": 192.65475614462918, "epoch": 4.583333333333333}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,50,'{"loss": 0.9829895639970999, "rewards/chosen": -67.01557155253884, "rewards/rejected": -68.88340924069567, "rewards/margins": 1.8678376881568013, "rewards/accuracies": 0.8, "logps/chosen": -6.7015571552538855, "logps/rejected": -6.888340924069564, "nll_loss": 6.687684463319324, "margins/logp": 0.18678376881568007, "accuracies/logp": 0.8, "logps_per_token/chosen": -6.7015571552538855, "logps_per_token/rejected": -6.888340924069564, "lengths/chosen": 10.5, "lengths/rejected": 9.05, "tokens_per_second": 6394.865050494221, "grad_norm": 8.996246910095214, "learning_rate": 9.893840362247809e-05, "pairs_per_second": 179.3791038006794, "epoch": 4.166666666666667}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,45,'{"loss": 0.9860066858483167, "rewards/chosen": -67.2312473473548, "rewards/rejected": -68.31077635590991, "rewards/margins": 1.0795290085551272, "rewards/accuracies": 0.7, "logps/chosen": -6.72312473473548, "logps/rejected": -6.831077635590992, "nll_loss": 6.704848872290717, "margins/logp": 0.10795290085551268, "accuracies/logp": 0.7, "logps_per_token/chosen": -6.72312473473548, "logps_per_token/rejected": -6.831077635590992, "lengths/chosen": 9.9, "lengths/rejected": 9.8, "tokens_per_second": 5508.736502717429, "grad_norm": 9.246491718292237, "learning_rate": 0.00020142070414860702, "pairs_per_second": 153.6607113728711, "epoch": 3.75}');
INSERT INTO "prefsweep_point" VALUES('interrupted',0,60,'{"loss": 0.6255414486122841, "rewards/chosen": -66.79583975377378, "rewards/rejected": -69.60256716063701, "rewards/margins": 2.8067274068632253, "rewards/accuracies": 0.8, "logps/chosen": -6.679583975377378, "logps/rejected": -6.960256716063699, "nll_loss": 6.657504398020069, "margins/logp": 0.2806727406863223, "accuracies/logp": 0.8, "logps_per_token/chosen": -6.679583975377378, "logps_per_token/rejected": -6.960256716063699, "lengths/chosen": 9.95, "lengths/rejected": 9.55, "tokens_per_second": 2710.7792915210293, "grad_norm": 7.8575160026550295, "learning_rate": 8.459208643659122e-07, "pairs_per_second": 76.46768100200364, "epoch": 5.0, "eval_loss": 1.4801569240069974, "eval_rewards/chosen": -66.73034332965703, "eval_rewards/rejected": -66.53108966923347, "eval_rewards/margins": -0.1992536604235724, "eval_rewards/accuracies": 0.5, "eval_logps/chosen": -6.673034332965704, "eval_logps/rejected": -6.653108966923346, "eval_nll_loss": 6.646082294688505, "eval_margins/logp": -0.019925366042357506, "eval_accuracies/logp": 0.5, "eval_logps_per_token/chosen": -6.673034332965704, "eval_logps_per_token/rejected": -6.653108966923346, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,0,'{"eval_loss": 1.7381297180188637, "eval_rewards/chosen": -66.86655304880554, "eval_rewards/rejected": -66.91575515985767, "eval_rewards/margins": 0.04920211105212147, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.686655304880555, "eval_logps/rejected": -6.691575515985766, "eval_nll_loss": 6.664453472810633, "eval_margins/logp": 0.0049202111052121245, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.686655304880555, "eval_logps_per_token/rejected": -6.691575515985766, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,15,'{"loss": 1.2972983656500578, "rewards/chosen": -67.65458791830292, "rewards/rejected": -68.66521879325353, "rewards/margins": 1.0106308749506088, "rewards/accuracies": 0.65, "logps/chosen": -6.765458791830293, "logps/rejected": -6.866521879325353, "nll_loss": 6.7299892417097515, "margins/logp": 0.1010630874950607, "accuracies/logp": 0.65, "logps_per_token/chosen": -6.765458791830293, "logps_per_token/rejected": -6.866521879325353, "lengths/chosen": 11.3, "lengths/rejected": 9.75, "tokens_per_second": 4382.771310783264, "grad_norm": 10.854487037658691, "learning_rate": 0.0009468163201617061, "pairs_per_second": 116.71827725121877, "epoch": 1.25}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,10,'{"loss": 1.6928103254962372, "rewards/chosen": -67.21102990114558, "rewards/rejected": -68.65429220095514, "rewards/margins": 1.4432622998095552, "rewards/accuracies": 0.5, "logps/chosen": -6.721102990114558, "logps/rejected": -6.865429220095512, "nll_loss": 6.714817043008475, "margins/logp": 0.14432622998095548, "accuracies/logp": 0.5, "logps_per_token/chosen": -6.721102990114558, "logps_per_token/rejected": -6.865429220095512, "lengths/chosen": 11.6, "lengths/rejected": 10.4, "tokens_per_second": 2428.771687406668, "grad_norm": 14.899415588378906, "learning_rate": 0.000992403876506104, "pairs_per_second": 61.72227922253287, "epoch": 0.8333333333333334}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,5,'{"loss": 2.762891021221356, "rewards/chosen": -68.78307366888073, "rewards/rejected": -68.67958028004283, "rewards/margins": -0.10349338883789513, "rewards/accuracies": 0.45, "logps/chosen": -6.878307366888071, "logps/rejected": -6.867958028004283, "nll_loss": 6.83805549621582, "margins/logp": -0.010349338883789461, "accuracies/logp": 0.45, "logps_per_token/chosen": -6.878307366888071, "logps_per_token/rejected": -6.867958028004283, "lengths/chosen": 8.75, "lengths/rejected": 9.5, "tokens_per_second": 11552.760774765138, "grad_norm": 12.989312934875489, "learning_rate": 0.0006666666666666666, "pairs_per_second": 341.7976560581402, "epoch": 0.4166666666666667}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,20,'{"loss": 1.9771034031698018, "rewards/chosen": -67.86866737052422, "rewards/rejected": -68.1427651651494, "rewards/margins": 0.2740977946251622, "rewards/accuracies": 0.45, "logps/chosen": -6.786866737052423, "logps/rejected": -6.81427651651494, "nll_loss": 6.794967610881014, "margins/logp": 0.027409779462516326, "accuracies/logp": 0.45, "logps_per_token/chosen": -6.786866737052423, "logps_per_token/rejected": -6.81427651651494, "lengths/chosen": 10.6, "lengths/rejected": 10.05, "tokens_per_second": 5582.892062214856, "grad_norm": 13.032463550567627, "learning_rate": 0.0008636868207865244, "pairs_per_second": 151.91543026434982, "epoch": 1.6666666666666667, "eval_loss": 1.7645797053080248, "eval_rewards/chosen": -66.835307514253, "eval_rewards/rejected": -66.68497354348938, "eval_rewards/margins": -0.15033397076363642, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.683530751425302, "eval_logps/rejected": -6.668497354348936, "eval_nll_loss": 6.657753720003016, "eval_margins/logp": -0.015033397076363642, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.683530751425302, "eval_logps_per_token/rejected": -6.668497354348936, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,30,'{"loss": 1.5431286533903215, "rewards/chosen": -67.35838915627015, "rewards/rejected": -68.22877118223673, "rewards/margins": 0.8703820259665811, "rewards/accuracies": 0.65, "logps/chosen": -6.735838915627015, "logps/rejected": -6.822877118223673, "nll_loss": 6.71040411064258, "margins/logp": 0.08703820259665825, "accuracies/logp": 0.65, "logps_per_token/chosen": -6.735838915627015, "logps_per_token/rejected": -6.822877118223673, "lengths/chosen": 10.4, "lengths/rejected": 9.05, "tokens_per_second": 7442.889038432429, "grad_norm": 12.914783763885499, "learning_rate": 0.0006153079353712201, "pairs_per_second": 210.54848765013944, "epoch": 2.5}');
INSERT INTO "prefsweep_point" VALUES('interrupted',1,25,'{"loss": 1.2915558619260552, "rewards/chosen": -67.43068800578777, "rewards/rejected": -69.28514234313116, "rewards/margins": 1.8544543373433797, "rewards/accuracies": 0.75, "logps/chosen": -6.7430688005787776, "logps/rejected": -6.9285142343131145, "nll_loss": 6.740586764672223, "margins/logp": 0.18544543373433792, "accuracies/logp": 0.75, "logps_per_token/chosen": -6.7430688005787776, "logps_per_token/rejected": -6.9285142343131145, "lengths/chosen": 10.2, "lengths/rejected": 9.3, "tokens_per_second": 7973.42250729144, "grad_norm": 9.17438097000122, "learning_rate": 0.00075, "pairs_per_second": 218.4499317066148, "epoch": 2.0833333333333335}');
CREATE TABLE prefsweep_progress (
	sweep VARCHAR(64) NOT NULL, 
	trial INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	metrics TEXT NOT NULL, 
	PRIMARY KEY (sweep, trial)
);
INSERT INTO "prefsweep_progress" VALUES('interrupted',0,60,'{"eval_loss": 1.4801569240069974, "eval_rewards/chosen": -66.73034332965703, "eval_rewards/rejected": -66.53108966923347, "eval_rewards/margins": -0.1992536604235724, "eval_rewards/accuracies": 0.5, "eval_logps/chosen": -6.673034332965704, "eval_logps/rejected": -6.653108966923346, "eval_nll_loss": 6.646082294688505, "eval_margins/logp": -0.019925366042357506, "eval_accuracies/logp": 0.5, "eval_logps_per_token/chosen": -6.673034332965704, "eval_logps_per_token/rejected": -6.653108966923346, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 0.6255414486122841, "rewards/chosen": -66.79583975377378, "rewards/rejected": -69.60256716063701, "rewards/margins": 2.8067274068632253, "rewards/accuracies": 0.8, "logps/chosen": -6.679583975377378, "logps/rejected": -6.960256716063699, "nll_loss": 6.657504398020069, "margins/logp": 0.2806727406863223, "accuracies/logp": 0.8, "logps_per_token/chosen": -6.679583975377378, "logps_per_token/rejected": -6.960256716063699, "lengths/chosen": 9.95, "lengths/rejected": 9.55, "tokens_per_second": 2710.7792915210293, "grad_norm": 7.8575160026550295, "learning_rate": 8.459208643659122e-07, "pairs_per_second": 76.46768100200364, "epoch": 5.0}');
INSERT INTO "prefsweep_progress" VALUES('interrupted',1,30,'{"eval_loss": 1.7645797053080248, "eval_rewards/chosen": -66.835307514253, "eval_rewards/rejected": -66.68497354348938, "eval_rewards/margins": -0.15033397076363642, "eval_rewards/accuracies": 0.625, "eval_logps/chosen": -6.683530751425302, "eval_logps/rejected": -6.668497354348936, "eval_nll_loss": 6.657753720003016, "eval_margins/logp": -0.015033397076363642, "eval_accuracies/logp": 0.625, "eval_logps_per_token/chosen": -6.683530751425302, "eval_logps_per_token/rejected": -6.668497354348936, "eval_lengths/chosen": 10.625, "eval_lengths/rejected": 9.0, "eval_exact_answers": 0.0, "eval_repetition": 0.0, "eval_answer_length": 4.0, "loss": 1.5431286533903215, "rewards/chosen": -67.35838915627015, "rewards/rejected": -68.22877118223673, "rewards/margins": 0.8703820259665811, "rewards/accuracies": 0.65, "logps/chosen": -6.735838915627015, "logps/rejected": -6.822877118223673, "nll_loss": 6.71040411064258, "margins/logp": 0.08703820259665825, "accuracies/logp": 0.65, "logps_per_token/chosen": -6.735838915627015, "logps_per_token/rejected": -6.822877118223673, "lengths/chosen": 10.4, "lengths/rejected": 9.05, "tokens_per_second": 7442.889038432429, "grad_norm": 12.914783763885499, "learning_rate": 0.0006153079353712201, "pairs_per_second": 210.54848765013944, "epoch": 2.5}');
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
INSERT INTO "prefsweep_spec" VALUES('interrupted',1,1.79586720594777059559e+09,'0767fd6325f3eaaad9dca9a6b7c9f19ac45066cfced0dd33a2d906d01cc4adb8','{"name":"interrupted","description":"A sweep from before the redesign","base":{"model":{"name_or_path":null,"generated":{"architecture":"llama","vocab_size":512,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"max_position_embeddings":512,"seed":0},"revision":null,"tokenizer":null,"dtype":"float32","attention":"auto","load_in_4bit":false},"data":{"train":[{"generated":"instructions","split":"train","rows":48,"seed":0,"weight":null}],"eval":[{"generated":"instructions","split":"eval","rows":8,"seed":0,"weight":null}],"eval_share":0.1,"apply_template":null,"score":"all","max_train_rows":null,"max_eval_rows":null,"max_length":128,"max_prompt_length":null,"chat_template":null,"bad_rows":"skip","max_bad_share":0.01},"loss":{"kind":"simpo","loss_type":"sigmoid","beta":2.0,"gamma":null,"gamma_beta_ratio":null,"label_smoothing":0.0,"alpha":0.0,"sft_weight":0.0,"nll_scale":0.0},"training":{"learning_rate":0.001,"pairs_per_update":4,"tokens_per_micro_batch":8192,"num_train_epochs":1.0,"max_steps":60,"lr_scheduler_type":"cosine","warmup_ratio":0.1,"weight_decay":0.0,"adam_beta1":0.9,"adam_beta2":0.999,"adam_epsilon":1e-8,"max_grad_norm":1.0,"bf16":false,"stochastic_rounding":true,"gradient_checkpointing":false,"distributed":"ddp","seed":42,"logging_steps":5,"eval_steps":20,"save_steps":10},"lora":null,"evaluation":{"prompts":2,"answer_steps":null,"samples":1,"max_new_tokens":4},"engine":"packed"},"search":{"dimensions":{"loss.beta":{"when":{},"choice":[2.0,5.0,10.0]},"loss.gamma":{"when":{},"choice":[0.5,1.0]}},"zipped":[]},"sampler":{"kind":"tpe","seed":1,"n_startup_trials":10,"n_ei_candidates":24},"enqueue":[],"warm_start":null,"order":{"kind":"reproducible","lag":null},"goal":{"metric":"eval_accuracies/logp","direction":"maximize"},"guard":{"loss":{"ratio":1.5,"updates":20},"grad_norm":{"times_median":20.0,"above":1000000.0,"updates":5,"after":10},"chosen_logps":{"fall":2.3,"fall_alone":4.6,"lowest":-10.0,"updates":5},"repetition":{"rise":0.5,"looks":2},"answer_length":{"ratio":3.0,"looks":2}},"also":[],"pruner":{"kind":"median","metric":null,"n_startup_trials":5,"n_warmup_steps":0,"n_min_trials":1},"budget":{"trials":3,"hours":null,"gpu_hours":null,"target":null,"concurrency":1},"resources":{"gpus_per_trial":null,"cpus_per_trial":1.0,"processes_per_trial":null,"trials_per_process":"auto"},"tracking":{"uri":null,"experiment":"prefsweep","artifacts":null},"notify":null,"judge":null,"sft":null,"keep_models":1,"storage":null,"mirror":null}');
CREATE TABLE prefsweep_sweep (
	sweep VARCHAR(64) NOT NULL, 
	id VARCHAR(32) NOT NULL, 
	schema INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	driver INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (sweep)
);
INSERT INTO "prefsweep_sweep" VALUES('interrupted','f1b9cb7a1d154f0c8630b8db5dd22db8',6,1,0,1795867205.94392);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'interrupted');
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
INSERT INTO "study_user_attributes" VALUES(1,1,'settled','{"lag": 2, "train_pairs": 48, "earlier": []}');
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
INSERT INTO "trial_intermediate_values" VALUES(2,1,20,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,1,40,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,1,60,0.5,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(5,2,0,0.625,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(6,2,20,0.625,'FINITE');
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
INSERT INTO "trial_user_attributes" VALUES(1,1,'identity','"f1815e156a234361185cee7d7eb1ce6f6889a5d5753f84039e24ab8dd45ab617"');
INSERT INTO "trial_user_attributes" VALUES(2,1,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(3,1,'started_at','1795867206.8485966');
INSERT INTO "trial_user_attributes" VALUES(4,1,'updates','60');
INSERT INTO "trial_user_attributes" VALUES(5,1,'asked','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false}');
INSERT INTO "trial_user_attributes" VALUES(6,1,'outcome','{"state": "COMPLETE", "reason": "", "failure": null, "diverged": false, "order": 4, "finished_at": 1795867243.819148}');
INSERT INTO "trial_user_attributes" VALUES(7,1,'values','["0.5"]');
INSERT INTO "trial_user_attributes" VALUES(8,2,'identity','"84525ebb10f53b83de9e7faff2c04f102f210ef3765c6094a13d90f86cd1dedc"');
INSERT INTO "trial_user_attributes" VALUES(9,2,'attempts','1');
INSERT INTO "trial_user_attributes" VALUES(10,2,'started_at','1795867243.8509588');
INSERT INTO "trial_user_attributes" VALUES(11,2,'updates','60');
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
INSERT INTO "trial_values" VALUES(1,1,0,0.5,'FINITE');
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
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-28 12:00:06.848641','2026-11-28 12:00:43.823352');
INSERT INTO "trials" VALUES(2,1,1,'RUNNING','2026-11-28 12:00:43.850989',NULL);
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
